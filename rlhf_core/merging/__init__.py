"""Merging of models of any size: inputs are read and the output is written chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.infra.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_core.contracts.merger import Merger as Merger
    from rlhf_core.merging.config import MergeConfig as MergeConfig
    from rlhf_core.merging.interpolation import layer_wise_interpolation as layer_wise_interpolation
    from rlhf_core.merging.merge import MergeResult as MergeResult
    from rlhf_core.merging.merge import ModelMerger as ModelMerger
    from rlhf_core.merging.merge_input import MergeInput as MergeInput
    from rlhf_core.merging.one_tensor import merge_tensor as merge_tensor
    from rlhf_core.merging.selection import kept_count as kept_count
    from rlhf_core.merging.selection import magnitudes as magnitudes
    from rlhf_core.merging.selection import tensor_thresholds as tensor_thresholds
    from rlhf_core.merging.selection import thresholds as thresholds
    from rlhf_core.merging.streams import CHUNK as CHUNK
    from rlhf_core.merging.streams import Chunk as Chunk
    from rlhf_core.merging.streams import TensorStream as TensorStream
    from rlhf_core.merging.tensor_names import is_embedding as is_embedding
    from rlhf_core.merging.weight_shares import require_one_sign as require_one_sign
    from rlhf_core.merging.weight_shares import share_of_weights as share_of_weights

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.contracts.merger": "Merger",
        "rlhf_core.merging.config": "MergeConfig",
        "rlhf_core.merging.merge_input": "MergeInput",
        "rlhf_core.merging.interpolation": "layer_wise_interpolation",
        "rlhf_core.merging.merge": "MergeResult ModelMerger",
        "rlhf_core.merging.one_tensor": "merge_tensor",
        "rlhf_core.merging.selection": "kept_count magnitudes tensor_thresholds thresholds",
        "rlhf_core.merging.streams": "CHUNK Chunk TensorStream",
        "rlhf_core.merging.tensor_names": "is_embedding",
        "rlhf_core.merging.weight_shares": "require_one_sign share_of_weights",
    },
)
