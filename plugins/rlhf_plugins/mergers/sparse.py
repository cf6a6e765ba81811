"""Mergers that sparsify task vectors: what DARE, DELLA and model breadcrumbs share is how the kept entries are combined."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger, require_one_sign, share_of_weights
from rlhf_plugins.mergers.task_arithmetic import task_arithmetic
from rlhf_plugins.mergers.ties import merge_weighted


class SparseConfig(BaseConfig):
    """Options of every merger that sparsifies task vectors."""

    election: Literal["none", "ties"] = Field(
        "none", description="`ties` elects a sign for each entry and merges what agrees with it; `none` adds all up."
    )
    normalize: bool | None = Field(
        None,
        description="Divide by the sum of the weights (with an election, of those that agree); false adds the weighted entries up"
        " as they are. Null divides with an election only.",
    )
    scale: float = Field(1.0, description="Factor λ of the merged task vector; larger moves farther from the base.")

    @property
    def divides(self) -> bool:
        """Whether the merged task vector is divided by weights."""
        return self.election == "ties" if self.normalize is None else self.normalize


def combine(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], factors: Sequence[float], config: SparseConfig
) -> Tensor:
    """Return θ₀ + λτ, in place of the base: τ = Σ wᵢfᵢδᵢ, or with an election what `ties.merge_weighted` makes of the δᵢ.

    Args:
        base: θ₀, (N,) float32; overwritten.
        deltas: sparsified task vectors δᵢ, each (N,) float32; overwritten.
        weights: wᵢ; divided by their sum where `normalize` is true, or with an election by the sum of those that agree.
        factors: fᵢ, what each δᵢ is still to be multiplied by, above zero.
        config: `election`, `normalize`, and `scale` λ.
    """
    if config.election == "ties":
        merged = merge_weighted(deltas, weights, normalize=config.divides, factors=factors)
        return base.add_(merged, alpha=config.scale)
    shares = share_of_weights(weights) if config.normalize else weights
    products = [share * factor for share, factor in zip(shares, factors, strict=True)]
    return task_arithmetic(base, deltas, products, config.scale)


class SparseMerger(Merger):
    """Base of mergers that keep some entries of each task vector and combine what they keep; they say which in `sparsify`."""

    commutative = True
    Config = SparseConfig
    config: SparseConfig
    needs_base = True

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights of mixed signs, or of sum zero, where the merged task vector is divided by them."""
        if self.config.divides:
            require_one_sign(weights)

    @abstractmethod
    def sparsify(self, chunk: Chunk, measured: Any) -> Iterable[tuple[Tensor, float]]:
        """Yield for each model its task vector with entries set to zero, in the chunk's shape, and a factor for the rest."""

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        deltas, factors = zip(*self.sparsify(chunk, measured), strict=True)
        return combine(chunk.origin, deltas, chunk.weights, factors, self.config)
