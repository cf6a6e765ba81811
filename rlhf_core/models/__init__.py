"""Models: the policy with its forward pass, the reference, attention, adapters."""

from rlhf_core.models.attention import OptimizedAttention
from rlhf_core.models.compile import compile_model
from rlhf_core.models.lora import apply_lora
from rlhf_core.models.policy import PolicyModel
from rlhf_core.models.reference import Reference

__all__ = ["OptimizedAttention", "PolicyModel", "Reference", "apply_lora", "compile_model"]
