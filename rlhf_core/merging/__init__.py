"""Merging of checkpoints of any size: inputs are read and the output is written chunk by chunk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_core.interfaces import Merger as Merger
    from rlhf_core.merging.config import MergeConfig as MergeConfig
    from rlhf_core.merging.inputs import MergeInput as MergeInput
    from rlhf_core.merging.interpolation import layer_wise_interpolation as layer_wise_interpolation
    from rlhf_core.merging.merge import MergeResult as MergeResult
    from rlhf_core.merging.merge import ModelMerger as ModelMerger
    from rlhf_core.merging.selection import kept_count as kept_count
    from rlhf_core.merging.selection import magnitudes as magnitudes
    from rlhf_core.merging.selection import tensor_thresholds as tensor_thresholds
    from rlhf_core.merging.selection import thresholds as thresholds
    from rlhf_core.merging.streams import CHUNK as CHUNK
    from rlhf_core.merging.streams import Chunk as Chunk
    from rlhf_core.merging.streams import TensorStream as TensorStream
    from rlhf_core.merging.tensor import merge_tensor as merge_tensor
    from rlhf_core.merging.weights import is_embedding as is_embedding
    from rlhf_core.merging.weights import require_one_sign as require_one_sign
    from rlhf_core.merging.weights import share_of_weights as share_of_weights

# Public name → the module that defines it, loaded on first use: torch comes with most of them.
_PUBLIC = {
    "CHUNK": "merging.streams",
    "Chunk": "merging.streams",
    "MergeConfig": "merging.config",
    "MergeInput": "merging.inputs",
    "MergeResult": "merging.merge",
    "Merger": "interfaces",
    "ModelMerger": "merging.merge",
    "TensorStream": "merging.streams",
    "is_embedding": "merging.weights",
    "kept_count": "merging.selection",
    "layer_wise_interpolation": "merging.interpolation",
    "magnitudes": "merging.selection",
    "merge_tensor": "merging.tensor",
    "require_one_sign": "merging.weights",
    "share_of_weights": "merging.weights",
    "tensor_thresholds": "merging.selection",
    "thresholds": "merging.selection",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"rlhf_core.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'rlhf_core.merging' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
