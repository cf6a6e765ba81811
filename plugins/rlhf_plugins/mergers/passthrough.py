"""Passthrough: a model as it is, or one that is put together of others' layers."""

from __future__ import annotations

from torch import Tensor

from rlhf_core.plugin import Chunk, Merger


class PassthroughMerger(Merger):
    """Take one model's values as they are, each times the weight: for models put together of runs of layers.

    A weight by place silences parts: with 0 for the projections that end a layer's halves, the layer hands on what it is given.
    """

    api = 1
    ignores_base = True
    models = (1, 1)

    def merge_chunk(self, chunk: Chunk, measured: None) -> Tensor:
        weight = chunk.weights[0]
        return chunk.tensors[0] if weight == 1.0 else chunk.tensors[0].mul_(weight)
