"""Rewards: what a run's `rewards` mean, plain functions as rewards, and the check that every reward's scores pass."""

from rlhf_core.rewards.checks import checked_scores, checked_steps
from rlhf_core.rewards.functions import FunctionReward, RewardFunction, as_reward
from rlhf_core.rewards.opening import Given, check_rewards, open_rewards
from rlhf_core.rewards.run import Reward, Rewards, Scores, rewards_changed, samples_of

__all__ = [
    "FunctionReward",
    "Given",
    "Reward",
    "RewardFunction",
    "Rewards",
    "Scores",
    "as_reward",
    "check_rewards",
    "checked_scores",
    "checked_steps",
    "open_rewards",
    "rewards_changed",
    "samples_of",
]
