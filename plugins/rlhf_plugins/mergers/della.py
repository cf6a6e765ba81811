"""DELLA: drop entries of task vectors at random, small ones rather than large ones, and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger, TensorStream
from rlhf_plugins.mergers.dare import LEVELS
from rlhf_plugins.mergers.sparse import check_fused_weights, fuse


def keep_bounds(columns: int, density: float, epsilon: float) -> Tensor:
    """Return the probability of keeping the entry of each rank, in multiples of 2⁻¹⁶, (C,) int32, the smallest entry's first.

    Deep et al. 2024, DELLA-Merging (arXiv 2406.11617), MagPrune: the probability falls linearly with the rank of |δ|.
    Here pᵣ = p - ε/2 + ε r / (C - 1), r = 0 … C - 1, so both ends are reached and the mean is p, while the paper's ends
    one step short of p - ε/2.

    Args:
        columns: C, entries of a row; a single one is kept with probability p.
        density: p.
        epsilon: ε.
    """
    ranks = torch.linspace(-0.5, 0.5, columns, dtype=torch.float64) if columns > 1 else torch.zeros(1)
    return (LEVELS * (density + epsilon * ranks)).round_().clamp_(1, LEVELS).to(torch.int32)


def magprune(delta: Tensor, words: Tensor, density: float, epsilon: float) -> Tensor:
    """Return δ with entries dropped by the rank of their size in the row, and the rest divided by their probability; in place.

    Deep et al. 2024 (arXiv 2406.11617), MagPrune: mᵢ ~ Bernoulli(pᵢ), δ̂ᵢ = mᵢ δᵢ / pᵢ, so E[δ̂] = δ. Equal sizes rank as they
    stand, from left to right.

    Args:
        delta: δ, (R, C) float32; overwritten.
        words: uniform whole numbers in -32768 … 32767, (R, C) int16.
        density: p.
        epsilon: ε.
    """
    bounds = keep_bounds(delta.shape[-1], density, epsilon).to(delta.device)
    # A word belongs to a rank instead of a place: they are independent and alike, and one scatter is enough.
    kept = torch.lt(words, bounds - LEVELS // 2, out=torch.empty_like(delta))
    factors = torch.empty_like(delta).scatter_(-1, row_order(delta.abs()), kept.mul_(LEVELS / bounds))
    return delta.mul_(factors)


def row_order(sizes: Tensor) -> Tensor:
    """Return the places of each row's entries, the smallest first, equal ones from left to right, (R, C) int64.

    Args:
        sizes: (R, C) float32, none below zero.
    """
    # Such floats sort as their bits do, so with the place below them one sort of whole numbers, which numpy does several times
    # as fast as a stable sort, gives the order.
    places = numpy.arange(sizes.shape[-1])
    keys = sizes.cpu().numpy().view(numpy.int32).astype(numpy.int64) << 32 | places
    keys.sort(axis=-1)
    return torch.from_numpy(keys & 0xFFFFFFFF).to(sizes.device)


class DELLAConfig(BaseConfig):
    """Options of DELLA."""

    density: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Mean probability p of keeping an entry, which is divided by its own; larger drops fewer and adds less"
        " noise.",
    )
    epsilon: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Width ε of the probabilities in a row, from p - ε/2 for the smallest entry to p + ε/2 for the largest,"
        " within (0, 1]; larger keeps large entries rather than small ones, 0 is DARE.",
    )
    seed: int = Field(0, ge=0, description="Seed of what is dropped; another value drops other entries.")
    election: Literal["none", "ties"] = Field(
        "ties", description="`ties` elects a sign for each entry and merges what agrees with it; `none` adds all up."
    )
    normalize: bool | None = Field(
        None,
        description="Divide by the sum of the weights (with an election, of those that agree); false adds the weighted entries up"
        " as they are. Null divides with an election only.",
    )
    scale: float = Field(1.0, description="Factor λ of the merged task vector; larger moves farther from the base.")

    @model_validator(mode="after")
    def _probabilities(self) -> DELLAConfig:
        low, high = self.density - self.epsilon / 2, self.density + self.epsilon / 2
        if low <= 1e-9 or high > 1 + 1e-9:
            raise ValueError(f"density ± epsilon / 2 must lie in (0, 1], and is {low:g} … {high:g}")
        return self


class _Measured(NamedTuple):
    densities: list[float]
    epsilons: list[float]


class DELLAMerger(Merger):
    """Drop small entries rather than large ones, at random, and rescale the rest (DELLA, Deep et al. 2024)."""

    api = 1
    commutative = True
    Config = DELLAConfig
    config: DELLAConfig
    needs_base = True
    per_model = ("density", "epsilon")
    by_row = True
    neutral: ClassVar = {"density": 1.0, "epsilon": 0.0, "scale": 1.0}

    def check_weights(self, weights: Sequence[float]) -> None:
        check_fused_weights(weights, self.config.election, self.config.normalize)

    def measure(self, stream: TensorStream) -> _Measured:
        densities = stream.option("density")
        return _Measured(densities, stream.option("epsilon"))

    def merge_chunk(self, chunk: Chunk, measured: _Measured) -> Tensor:
        kept = []
        for model, delta in enumerate(chunk.deltas()):
            density, epsilon = measured.densities[model], measured.epsilons[model]
            all_kept = density >= 1 and epsilon == 0
            kept.append(delta if all_kept else magprune(delta, chunk.random(model), density, epsilon))
        config = self.config
        return fuse(
            chunk.origin,
            kept,
            chunk.weights,
            election=config.election,
            normalize=config.normalize,
            scale=config.scale,
        )
