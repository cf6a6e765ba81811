"""DARE: drop entries of task vectors at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger, TensorStream, tensor_thresholds
from rlhf_plugins.mergers.sparse import check_fused_weights, fuse
from rlhf_plugins.mergers.ties import trim

LEVELS = 1 << 16
"""Values that a random word takes: probabilities are multiples of 1 / LEVELS."""


def drop(delta: Tensor, words: Tensor, density: float) -> tuple[Tensor, float]:
    """Return δ with each entry kept with probability p and else zero, in place, and 1 / p, the factor of what is left.

    Yu et al. 2024, Language models are super Mario (arXiv 2311.03099), drop and rescale: m ~ Bernoulli(1 - drop rate),
    δ̂ = m ⊙ δ / (1 - drop rate). Here p = 1 - drop rate is rounded to a multiple of 2⁻¹⁶, and the factor is that of the rounded
    number, so E[δ̂] = δ. It is left to the caller, who multiplies by a weight anyway.

    Args:
        delta: δ, (N,) float32; overwritten.
        words: uniform whole numbers in -32768 … 32767, (N,) int16.
        density: p, in (0, 1].
    """
    bound = max(1, round(density * LEVELS))
    if bound >= LEVELS:  # no word reaches it, and it doesn't fit into 16 bits
        return delta, 1.0
    # Multiplying by 0 and 1 in float32 is far faster than filling by a mask.
    return delta.mul_(torch.lt(words, bound - LEVELS // 2, out=torch.empty_like(delta))), LEVELS / bound


class DAREConfig(BaseConfig):
    """Options of DARE."""

    density: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Probability p of keeping an entry, which is divided by it; larger drops fewer and adds less noise.",
    )
    seed: int = Field(0, ge=0, description="Seed of what is dropped; another value drops other entries.")
    trim: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of each task vector's entries, the largest, that is left before any are dropped; larger trims less, 1"
        " not at all.",
    )
    election: Literal["none", "ties"] = Field(
        "none", description="`ties` elects a sign for each entry and merges what agrees with it; `none` adds all up."
    )
    normalize: bool | None = Field(
        None,
        description="Divide by the sum of the weights (with an election, of those that agree); false adds the weighted entries up"
        " as they are. Null divides with an election only.",
    )
    scale: float = Field(1.0, description="Factor λ of the merged task vector; larger moves farther from the base.")


class _Measured(NamedTuple):
    thresholds: list[float]
    densities: list[float]


class DAREMerger(Merger):
    """Drop entries at random and rescale the rest, with or without an election of signs (DARE, Yu et al. 2024)."""

    api = 1
    commutative = True
    Config = DAREConfig
    config: DAREConfig
    needs_base = True
    per_model = ("density", "trim")
    neutral: ClassVar = {"density": 1.0, "trim": 1.0, "scale": 1.0}

    def check_weights(self, weights: Sequence[float]) -> None:
        check_fused_weights(weights, self.config.election, self.config.normalize)

    def measure(self, stream: TensorStream) -> _Measured:
        thresholds = tensor_thresholds(stream, stream.option("trim"))
        return _Measured(thresholds, stream.option("density"))

    def merge_chunk(self, chunk: Chunk, measured: _Measured) -> Tensor:
        kept, factors = [], []
        for model, delta in enumerate(chunk.deltas()):
            density = measured.densities[model]
            left = trim(delta, measured.thresholds[model])
            left, factor = drop(left, chunk.random(model), density) if density < 1 else (left, 1.0)
            kept.append(left)
            factors.append(factor)
        config = self.config
        return fuse(
            chunk.origin,
            kept,
            chunk.weights,
            election=config.election,
            normalize=config.normalize,
            scale=config.scale,
            factors=factors,
        )
