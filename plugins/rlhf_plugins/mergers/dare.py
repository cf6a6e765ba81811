"""DARE: drop entries of task vectors at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import Chunk, TensorStream, tensor_thresholds
from rlhf_plugins.mergers.sparse import SparseConfig, SparseMerger
from rlhf_plugins.mergers.ties import trim

LEVELS = 1 << 16
"""Number of values of a random 16-bit integer: probabilities are multiples of 1 / LEVELS."""


def drop(delta: Tensor, draws: Tensor, density: float) -> tuple[Tensor, float]:
    """Return δ with each entry kept with probability p and else set to zero, in place, and 1 / p, the factor of the rest.

    Yu et al. 2024, Language models are super Mario (arXiv 2311.03099), drop and rescale: m ~ Bernoulli(1 - drop rate),
    δ̂ = m ⊙ δ / (1 - drop rate). Here p = 1 - drop rate is rounded to a multiple of 2⁻¹⁶, and the factor is that of the rounded
    number, so E[δ̂] = δ. The caller applies it, together with the model's weight.

    Args:
        delta: δ, (N,) float32; overwritten.
        draws: uniform random integers from -32768 to 32767, (N,) int16.
        density: p, in (0, 1].
    """
    bound = max(1, round(density * LEVELS))
    if bound >= LEVELS:  # every entry is kept, and the bound doesn't fit into 16 bits
        return delta, 1.0
    # Multiplying by 0 and 1 in float32 is far faster than masked filling.
    return delta.mul_(torch.lt(draws, bound - LEVELS // 2, out=torch.empty_like(delta))), LEVELS / bound


class DAREConfig(SparseConfig):
    """Options of DARE."""

    density: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Probability p of keeping an entry; kept entries are divided by p. Larger drops fewer and adds less noise.",
    )
    seed: int = Field(0, ge=0, description="Seed of what is dropped; another value drops other entries.")
    trim: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of each task vector's entries, the largest, that is kept before any are dropped at random; larger"
        " trims less, 1 not at all.",
    )


class _Measured(NamedTuple):
    """One number for each model."""

    thresholds: list[float]
    """The smallest |δ| that trimming keeps."""
    densities: list[float]


class DAREMerger(SparseMerger):
    """Drop entries at random and rescale the rest, with or without an election of signs (DARE, Yu et al. 2024)."""

    api = 1
    Config = DAREConfig
    config: DAREConfig
    per_model = ("density", "trim")
    neutral: ClassVar = {"density": 1.0, "trim": 1.0, "scale": 1.0}

    def measure(self, stream: TensorStream) -> _Measured:
        """Return each model's trimming threshold and its probability of keeping an entry."""
        thresholds = tensor_thresholds(stream, stream.option("trim"))
        return _Measured(thresholds, stream.option("density"))

    def sparsify(self, chunk: Chunk, measured: _Measured) -> Iterator[tuple[Tensor, float]]:
        """Trim each task vector, then drop entries at random; the factor of the rest is 1 / p."""
        for model, delta in enumerate(chunk.deltas()):
            density = measured.densities[model]
            trimmed = trim(delta, measured.thresholds[model])
            yield drop(trimmed, chunk.random(model), density) if density < 1 else (trimmed, 1.0)
