"""Model breadcrumbs: set the largest and the smallest entries of task vectors to zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy
import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import Chunk, TensorStream, kept_count, magnitudes, tensor_thresholds
from rlhf_plugins.mergers.sparse import SparseConfig, SparseMerger


def limit_ranks(count: int, gamma: float, density: float) -> tuple[int, int]:
    """Return the ranks of the largest and of the smallest entry that is kept of `count`, 1 for the largest entry of all.

    Args:
        count: number of entries that are ranked.
        gamma: γ, share of the entries that is dropped at the top; their number is rounded down.
        density: β, share of the entries that is kept, the largest of the rest; where the rest is less, all of it.
    """
    dropped = math.floor(gamma * count + 1e-6)
    return dropped + 1, min(count, dropped + kept_count(density, count))


def row_limits(sizes: Tensor, gamma: float, density: float) -> tuple[Tensor, Tensor]:
    """Return for each row the smallest and the largest |δ| that is kept, each (R, 1).

    Args:
        sizes: |δ|, (R, C) float32.
        gamma: γ, share of a row's entries that is dropped at the top.
        density: β, share of a row's entries that is kept.
    """
    columns = sizes.shape[-1]
    first, last = limit_ranks(columns, gamma, density)
    # Two calls: numpy partitions fast around one rank at a time only.
    low, high = (
        numpy.partition(sizes.cpu().numpy(), columns - rank, axis=-1)[:, columns - rank, None] for rank in (last, first)
    )
    return torch.from_numpy(low).to(sizes.device), torch.from_numpy(high).to(sizes.device)


def keep_between(delta: Tensor, sizes: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return δ with the entries outside of low ≤ |δ| ≤ high set to zero, in place.

    Davari & Belilovsky 2024, Model Breadcrumbs (arXiv 2312.06795), section 3: a mask removes both tails of |δ|. Tails are those
    of a row, as in the authors' code, or of a tensor; entries at a limit are kept, however many.

    Args:
        delta: δ, (R, C) float32; overwritten.
        sizes: |δ|, (R, C).
        low: smallest |δ| that is kept, (R, 1) or one number for all rows.
        high: largest |δ| that is kept, likewise.
    """
    # Multiplying by 0 and 1 in float32 is far faster than masked filling.
    kept = torch.ge(sizes, low, out=torch.empty_like(sizes))
    return delta.mul_(kept).mul_(torch.le(sizes, high, out=kept))


class BreadcrumbsConfig(SparseConfig):
    """Options of model breadcrumbs."""

    density: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share β of the entries that is kept, the largest after the outliers; larger keeps smaller ones too.",
    )
    gamma: float = Field(
        0.01,
        ge=0,
        lt=0.5,
        description="Share γ of the entries, the largest, that is dropped as outliers; larger drops more.",
    )
    scope: Literal["row", "tensor"] = Field(
        "row", description="Entries are ranked within each row, or (`tensor`) over the whole tensor."
    )


class BreadcrumbsMerger(SparseMerger):
    """Drop outliers and small entries of task vectors (model breadcrumbs, Davari & Belilovsky 2024)."""

    api = 1
    Config = BreadcrumbsConfig
    config: BreadcrumbsConfig
    per_model = ("density", "gamma")
    neutral: ClassVar = {"density": 1.0, "gamma": 0.0, "scale": 1.0}
    chunk_shape = "rows"

    def measure(self, stream: TensorStream) -> list[tuple[float, float]]:
        """Return each model's (γ, β) for `scope: row`; for `scope: tensor`, its smallest and largest |δ| that are kept."""
        gammas, densities = stream.option("gamma"), stream.option("density")
        pairs = list(zip(gammas, densities, strict=True))
        if self.config.scope == "row":
            return pairs
        ranks = [limit_ranks(stream.count, *pair) for pair in pairs]
        shares = [rank / max(1, stream.count) for pair in ranks for rank in pair]
        limits = tensor_thresholds(stream, shares, lambda chunk: [size for size in magnitudes(chunk) for _ in range(2)])
        # Where none is dropped at the top, the largest needn't be known.
        highs = [high if first > 1 else math.inf for high, (first, _) in zip(limits[::2], ranks, strict=True)]
        return list(zip(limits[1::2], highs, strict=True))

    def sparsify(self, chunk: Chunk, measured: list[tuple[float, float]]) -> Iterator[tuple[Tensor, float]]:
        """Keep the entries between each row's, or the tensor's, limits of |δ|; the factors are 1."""
        for delta, given in zip(chunk.deltas(), measured, strict=True):
            sizes = delta.abs()
            limits: Any = row_limits(sizes, *given) if self.config.scope == "row" else given
            yield keep_between(delta, sizes, *limits), 1.0
