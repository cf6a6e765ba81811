"""Rewards of a run: a configuration's list is opened (`opening`), then completions are scored and the scores checked.

`function_reward` makes rewards of plain functions, `score_checks` checks scores, `session` runs rewards beside each other and
beside generation, `background` and `reward_process` are where they run, `scoring` adds up weighted rewards.
"""

from rlhf_core.rewards.function_reward import FunctionReward, RewardFunction, as_reward
from rlhf_core.rewards.opening import RewardLike, check_given, check_rewards, mistakes_beside, open_reward, open_rewards
from rlhf_core.rewards.score_checks import checked_scores, checked_steps
from rlhf_core.rewards.scoring import Rewards, RewardSession, Scores, rewards_changed, samples_of, samples_of_prompt
from rlhf_core.rewards.session import WeightedReward

__all__ = [
    "FunctionReward",
    "RewardFunction",
    "RewardLike",
    "RewardSession",
    "Rewards",
    "Scores",
    "WeightedReward",
    "as_reward",
    "check_given",
    "check_rewards",
    "checked_scores",
    "checked_steps",
    "mistakes_beside",
    "open_reward",
    "open_rewards",
    "rewards_changed",
    "samples_of",
    "samples_of_prompt",
]
