"""Models: policies, reward and value models, the reference, and the forward pass that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.infra.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_core.models.attention import OptimizedAttention as OptimizedAttention
    from rlhf_core.models.compile import compile_model as compile_model
    from rlhf_core.models.context_compressor import ContextCompressor as ContextCompressor
    from rlhf_core.models.context_compressor import check_reader as check_reader
    from rlhf_core.models.context_compressor import context_span as context_span
    from rlhf_core.models.hidden_states import HiddenStates as HiddenStates
    from rlhf_core.models.load_options import LoadOptions as LoadOptions
    from rlhf_core.models.logprobs import exact_log_softmax as exact_log_softmax
    from rlhf_core.models.logprobs import over_vocabulary as over_vocabulary
    from rlhf_core.models.lora import apply_lora as apply_lora
    from rlhf_core.models.policy_model import PolicyModel as PolicyModel
    from rlhf_core.models.process_reward_model import ProcessRewardModel as ProcessRewardModel
    from rlhf_core.models.reference import Reference as Reference
    from rlhf_core.models.reward_model import RewardModel as RewardModel
    from rlhf_core.models.sequence_model import SequenceModel as SequenceModel
    from rlhf_core.models.soft_tokens import SOFT as SOFT
    from rlhf_core.models.soft_tokens import SoftVocabulary as SoftVocabulary
    from rlhf_core.models.soft_tokens import with_soft_tokens as with_soft_tokens
    from rlhf_core.models.value_model import ValueModel as ValueModel

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.models.attention": "OptimizedAttention",
        "rlhf_core.models.compile": "compile_model",
        "rlhf_core.models.context_compressor": "ContextCompressor check_reader context_span",
        "rlhf_core.models.logprobs": "exact_log_softmax over_vocabulary",
        "rlhf_core.models.lora": "apply_lora",
        "rlhf_core.models.load_options": "LoadOptions",
        "rlhf_core.models.policy_model": "PolicyModel",
        "rlhf_core.models.process_reward_model": "ProcessRewardModel",
        "rlhf_core.models.reference": "Reference",
        "rlhf_core.models.reward_model": "RewardModel",
        "rlhf_core.models.sequence_model": "SequenceModel",
        "rlhf_core.models.soft_tokens": "SOFT SoftVocabulary with_soft_tokens",
        "rlhf_core.models.hidden_states": "HiddenStates",
        "rlhf_core.models.value_model": "ValueModel",
    },
)
