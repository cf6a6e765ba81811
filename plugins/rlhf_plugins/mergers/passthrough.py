"""Passthrough: one model's values unchanged, as in models assembled from layers of others."""

from __future__ import annotations

from torch import Tensor

from rlhf_core.plugin import Chunk, Merger


class PassthroughMerger(Merger):
    """Take one model's values times its weight: for models assembled from ranges of layers.

    A weight of 0 for a layer's output projections (`o_proj`, `down_proj`) makes the layer return its input.
    """

    api = 1
    ignores_base = True
    models = (1, 1)

    def merge_chunk(self, chunk: Chunk, measured: None) -> Tensor:
        weight = chunk.weights[0]
        return chunk.tensors[0] if weight == 1.0 else chunk.tensors[0].mul_(weight)
