"""Layer-wise interpolation between a base and a model: how far is set for each layer."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger


def interpolate(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return (1 - t) θ₀ + t θ₁, in place of the start.

    Args:
        start: θ₀, (N,) float32; overwritten.
        end: θ₁, likewise.
        t: 0 gives the start, 1 the end; beyond them it extrapolates.
    """
    return start.mul_(1 - t).add_(end, alpha=t)


class LayerWiseConfig(BaseConfig):
    """Options of layer-wise interpolation."""

    t: float = Field(
        0.5,
        description="Where between the base (0) and the model (1) the result lies; larger is nearer the model. Usually a list"
        " over the layers, or a value for each kind of tensor.",
    )


class LayerWiseMerger(Merger):
    """Interpolate linearly from the base to one model, by a share that each layer may have of its own."""

    api = 1
    Config = LayerWiseConfig
    config: LayerWiseConfig
    needs_base = True
    models = (1, 1)
    neutral: ClassVar = {"t": 1.0}

    def merge_chunk(self, chunk: Chunk, measured: None) -> Tensor:
        return interpolate(chunk.origin, chunk.tensors[0], self.config.t * chunk.weights[0])
