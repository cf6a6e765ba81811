"""Model breadcrumbs: leave outliers and small entries of task vectors out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy
import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger, TensorStream, kept_count, magnitudes, tensor_thresholds
from rlhf_plugins.mergers.sparse import check_fused_weights, fuse


def limit_ranks(count: int, gamma: float, density: float) -> tuple[int, int]:
    """Return the ranks, from the largest, of the first and the last entry that is kept of `count`.

    Args:
        count: entries that are ranked.
        gamma: γ, share of the entries that is left out at the top, rounded down.
        density: β, share of the entries that is kept, of the rest the largest; where the rest is less, all of it.
    """
    dropped = math.floor(gamma * count + 1e-6)
    return dropped + 1, min(count, dropped + kept_count(density, count))


def row_limits(sizes: Tensor, gamma: float, density: float) -> tuple[Tensor, Tensor]:
    """Return for each row the smallest and the largest |δ| that is kept, each (R, 1).

    Args:
        sizes: |δ|, (R, C) float32.
        gamma: γ.
        density: β.
    """
    columns = sizes.shape[-1]
    first, last = limit_ranks(columns, gamma, density)
    # Two partitions: numpy has a fast path for one place at a time only.
    low, high = (
        numpy.partition(sizes.cpu().numpy(), columns - rank, axis=-1)[:, columns - rank, None] for rank in (last, first)
    )
    return torch.from_numpy(low).to(sizes.device), torch.from_numpy(high).to(sizes.device)


def leave_crumbs(delta: Tensor, sizes: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return δ with the entries outside of low ≤ |δ| ≤ high set to zero, in place.

    Davari & Belilovsky 2024, Model Breadcrumbs (arXiv 2312.06795), section 3: a mask takes both tails of |δ| away. Tails are
    those of a row, as in the authors' code, or of a tensor; entries at a limit are kept, however many.

    Args:
        delta: δ, (R, C) float32; overwritten.
        sizes: |δ|, (R, C).
        low: smallest |δ| that is kept, (R, 1) or one for all.
        high: the largest.
    """
    # Multiplying by 0 and 1 in float32 is far faster than filling by a mask.
    kept = torch.ge(sizes, low, out=torch.empty_like(sizes))
    return delta.mul_(kept).mul_(torch.le(sizes, high, out=kept))


class BreadcrumbsConfig(BaseConfig):
    """Options of model breadcrumbs."""

    density: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share β of the entries that is kept, the largest once the outliers are gone; larger keeps smaller ones too.",
    )
    gamma: float = Field(
        0.01,
        ge=0,
        lt=0.5,
        description="Share γ of the entries, the largest, that is left out as outliers; larger leaves more out.",
    )
    scope: Literal["row", "tensor"] = Field(
        "row", description="Entries are ranked within each row, or (`tensor`) over the whole tensor."
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


class BreadcrumbsMerger(Merger):
    """Leave outliers and small entries of task vectors out (model breadcrumbs, Davari & Belilovsky 2024)."""

    api = 1
    commutative = True
    Config = BreadcrumbsConfig
    config: BreadcrumbsConfig
    needs_base = True
    per_model = ("density", "gamma")
    neutral: ClassVar = {"density": 1.0, "gamma": 0.0, "scale": 1.0}
    by_row = True

    def check_weights(self, weights: Sequence[float]) -> None:
        check_fused_weights(weights, self.config.election, self.config.normalize)

    def measure(self, stream: TensorStream) -> list[tuple[float, float]]:
        """Return each model's (γ, β), or for a whole tensor its limits of |δ|."""
        gammas, densities = stream.option("gamma"), stream.option("density")
        pairs = list(zip(gammas, densities, strict=True))
        if self.config.scope == "row":
            return pairs
        ranks = [limit_ranks(stream.count, *pair) for pair in pairs]
        shares = [rank / max(1, stream.count) for pair in ranks for rank in pair]
        limits = tensor_thresholds(stream, shares, lambda chunk: [size for size in magnitudes(chunk) for _ in range(2)])
        # With none left out at the top there is no need to know the largest.
        highs = [high if first > 1 else math.inf for high, (first, _) in zip(limits[::2], ranks, strict=True)]
        return list(zip(limits[1::2], highs, strict=True))

    def merge_chunk(self, chunk: Chunk, measured: list[tuple[float, float]]) -> Tensor:
        kept = []
        for delta, given in zip(chunk.deltas(), measured, strict=True):
            sizes = delta.abs()
            limits: Any = row_limits(sizes, *given) if self.config.scope == "row" else given
            kept.append(leave_crumbs(delta, sizes, *limits))
        config = self.config
        return fuse(
            chunk.origin,
            kept,
            chunk.weights,
            election=config.election,
            normalize=config.normalize,
            scale=config.scale,
        )
