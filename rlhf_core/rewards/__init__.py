"""Rewards: what a run's `rewards` mean, plain functions as rewards, and the check that every reward's scores pass."""

from rlhf_core.rewards.function_reward import FunctionReward, RewardFunction, as_reward
from rlhf_core.rewards.opening import RewardLike, check_rewards, open_rewards
from rlhf_core.rewards.score_checks import checked_scores, checked_steps
from rlhf_core.rewards.scoring import Rewards, Scores, WeightedReward, rewards_changed, samples_of

__all__ = [
    "FunctionReward",
    "RewardFunction",
    "RewardLike",
    "Rewards",
    "Scores",
    "WeightedReward",
    "as_reward",
    "check_rewards",
    "checked_scores",
    "checked_steps",
    "open_rewards",
    "rewards_changed",
    "samples_of",
]
