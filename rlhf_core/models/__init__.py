"""Models: the policy with its forward pass, the reference, attention, adapters."""

from rlhf_core.models.attention import OptimizedAttention
from rlhf_core.models.compile import compile_model
from rlhf_core.models.lora import apply_lora
from rlhf_core.models.policy import PolicyModel
from rlhf_core.models.process_reward import ProcessRewardModel
from rlhf_core.models.reference import Reference
from rlhf_core.models.reward import RewardModel
from rlhf_core.models.sequence import SequenceModel

__all__ = [
    "OptimizedAttention",
    "PolicyModel",
    "ProcessRewardModel",
    "Reference",
    "RewardModel",
    "SequenceModel",
    "apply_lora",
    "compile_model",
]
