"""Weighted mean of models."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger, require_one_sign


def linear(tensors: Sequence[Tensor], weights: Sequence[float], divisor: float = 1.0) -> Tensor:
    """Return Σ wᵢ θᵢ / d, in place of the first tensor.

    Wortsman et al. 2022, Model soups (arXiv 2203.05482), section 2, with weights of any size. The sum is divided once, at its
    end: the plain mean of 16-bit models is then exact until its only rounding.

    Args:
        tensors: θᵢ, each (N,) float32; overwritten.
        weights: wᵢ.
        divisor: d; with the sum of the weights the result is their weighted mean.
    """
    total = tensors[0] if weights[0] == 1.0 else tensors[0].mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total if divisor == 1.0 else total.div_(divisor)


class LinearConfig(BaseConfig):
    """Options of the weighted mean."""

    normalize: bool = Field(True, description="Divide the weights by their sum; false takes them as they are.")


class LinearMerger(Merger):
    """Weighted mean of models (model soups, Wortsman et al. 2022)."""

    api = 1
    commutative = True
    ignores_base = True
    Config = LinearConfig
    config: LinearConfig

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights of mixed signs, or of sum zero, where they are normalised."""
        if self.config.normalize:
            require_one_sign(weights)

    def merge_chunk(self, chunk: Chunk, measured: None) -> Tensor:
        return linear(chunk.tensors, chunk.weights, sum(chunk.weights) if self.config.normalize else 1.0)
