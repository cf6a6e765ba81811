"""DELLA: drop entries of task vectors at random, small ones rather than large ones, and rescale the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import numpy
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_core.plugin import Chunk, TensorStream
from rlhf_plugins.mergers.dare import LEVELS
from rlhf_plugins.mergers.sparse import SparseConfig, SparseMerger


def keep_bounds(columns: int, density: float, epsilon: float) -> Tensor:
    """Return the probability of keeping the entry of each rank, in units of 2⁻¹⁶, (C,) int32, the smallest entry's first.

    Deep et al. 2024, DELLA-Merging (arXiv 2406.11617), MagPrune: the probability falls linearly with the rank of |δ|.
    Deviation: pᵣ = p - ε/2 + ε r / (C - 1), r = 0 … C - 1, reaches both p - ε/2 and p + ε/2 and has the mean p; the paper's
    ends one step short of p - ε/2.

    Args:
        columns: C, entries of a row; a single one is kept with probability p.
        density: p, mean probability of keeping an entry.
        epsilon: ε, difference between the largest entry's probability and the smallest one's.
    """
    ranks = torch.linspace(-0.5, 0.5, columns, dtype=torch.float64) if columns > 1 else torch.zeros(1)
    return (LEVELS * (density + epsilon * ranks)).round_().clamp_(1, LEVELS).to(torch.int32)


def magprune(delta: Tensor, draws: Tensor, density: float, epsilon: float) -> Tensor:
    """Return δ with entries dropped at random and the others divided by their probability of being kept; in place.

    Deep et al. 2024 (arXiv 2406.11617), MagPrune: mᵢ ~ Bernoulli(pᵢ), δ̂ᵢ = mᵢ δᵢ / pᵢ, so E[δ̂] = δ. pᵢ rises with the rank of
    |δᵢ| in its row (`keep_bounds`); equal sizes rank from left to right.

    Args:
        delta: δ, (R, C) float32; overwritten.
        draws: uniform random integers from -32768 to 32767, (R, C) int16.
        density: p, mean probability of keeping an entry.
        epsilon: ε, width of the probabilities in a row.
    """
    bounds = keep_bounds(delta.shape[-1], density, epsilon).to(delta.device)
    # Draws are taken by rank, not by column: they are independent and identically distributed, and so one scatter is enough.
    kept = torch.lt(draws, bounds - LEVELS // 2, out=torch.empty_like(delta))
    factors = torch.empty_like(delta).scatter_(-1, row_order(delta.abs()), kept.mul_(LEVELS / bounds))
    return delta.mul_(factors)


def row_order(sizes: Tensor) -> Tensor:
    """Return the columns of each row's entries in ascending order, equal ones from left to right, (R, C) int64.

    Args:
        sizes: (R, C) float32, none below zero.
    """
    # Floats that aren't negative sort as their bits do. With the column in the lower bits, one sort of integers gives the order;
    # numpy does that several times as fast as a stable sort.
    columns = numpy.arange(sizes.shape[-1])
    keys = sizes.cpu().numpy().view(numpy.int32).astype(numpy.int64) << 32 | columns
    keys.sort(axis=-1)
    return torch.from_numpy(keys & 0xFFFFFFFF).to(sizes.device)


class DELLAConfig(SparseConfig):
    """Options of DELLA."""

    density: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Mean probability p of keeping an entry; kept entries are divided by their own probability. Larger drops"
        " fewer and adds less noise.",
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

    @model_validator(mode="after")
    def _probabilities(self) -> DELLAConfig:
        """Refuse probabilities of keeping an entry that aren't above 0 and at most 1."""
        low, high = self.density - self.epsilon / 2, self.density + self.epsilon / 2
        if low <= 1e-9 or high > 1 + 1e-9:
            raise ValueError(f"density ± epsilon / 2 must lie in (0, 1], and is {low:g} … {high:g}")
        return self


class _Measured(NamedTuple):
    """One number for each model."""

    densities: list[float]
    epsilons: list[float]


class DELLAMerger(SparseMerger):
    """Drop small entries rather than large ones, at random, and rescale the rest (DELLA, Deep et al. 2024)."""

    api = 1
    Config = DELLAConfig
    config: DELLAConfig
    per_model = ("density", "epsilon")
    chunk_shape = "rows"
    neutral: ClassVar = {"density": 1.0, "epsilon": 0.0, "scale": 1.0}

    def measure(self, stream: TensorStream) -> _Measured:
        """Return each model's mean probability of keeping an entry, and the width of these probabilities."""
        return _Measured(stream.option("density"), stream.option("epsilon"))

    def sparsify(self, chunk: Chunk, measured: _Measured) -> Iterator[tuple[Tensor, float]]:
        """Drop entries at random by the rank of |δ| in their row, and rescale the rest; the factors are 1."""
        for model, delta in enumerate(chunk.deltas()):
            density, epsilon = measured.densities[model], measured.epsilons[model]
            keeps_all = density >= 1 and epsilon == 0
            yield (delta if keeps_all else magprune(delta, chunk.random(model), density, epsilon)), 1.0
