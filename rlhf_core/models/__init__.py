"""Models: policies, reward and value models, the reference, and the forward pass that they share."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_core.models.attention import OptimizedAttention as OptimizedAttention
    from rlhf_core.models.compile import compile_model as compile_model
    from rlhf_core.models.logprobs import over_vocabulary as over_vocabulary
    from rlhf_core.models.lora import apply_lora as apply_lora
    from rlhf_core.models.options import LoadOptions as LoadOptions
    from rlhf_core.models.policy import PolicyModel as PolicyModel
    from rlhf_core.models.process_reward import ProcessRewardModel as ProcessRewardModel
    from rlhf_core.models.reference import Reference as Reference
    from rlhf_core.models.reward import RewardModel as RewardModel
    from rlhf_core.models.sequence import SequenceModel as SequenceModel
    from rlhf_core.models.states import HiddenStates as HiddenStates
    from rlhf_core.models.value import ValueModel as ValueModel

# Public name → the module that defines it, loaded on first use.
_PUBLIC = {
    "OptimizedAttention": "attention",
    "compile_model": "compile",
    "over_vocabulary": "logprobs",
    "apply_lora": "lora",
    "LoadOptions": "options",
    "PolicyModel": "policy",
    "ProcessRewardModel": "process_reward",
    "Reference": "reference",
    "RewardModel": "reward",
    "SequenceModel": "sequence",
    "HiddenStates": "states",
    "ValueModel": "value",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"rlhf_core.models.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'rlhf_core.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
