"""What methods that thin task vectors out share: how what is left of them is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from rlhf_core.plugin import require_one_sign, share_of_weights
from rlhf_plugins.mergers.task_arithmetic import task_arithmetic
from rlhf_plugins.mergers.ties import merge_weighted

Election = Literal["none", "ties"]


def fuse(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    election: Election,
    normalize: bool | None,
    scale: float,
    factors: Sequence[float] | None = None,
) -> Tensor:
    """Return θ₀ + λτ, in place of the base, with τ = Σ wᵢδᵢ, or with an election what `ties.merge_weighted` makes of them.

    Args:
        base: θ₀, (N,) float32; overwritten.
        deltas: thinned task vectors δᵢ, each (N,) float32; overwritten.
        weights: wᵢ.
        election: whether each entry elects a sign.
        normalize: divide by the sum of the weights (with an election, of those that agree); None does so with an election only.
        scale: λ.
        factors: what each δᵢ is still to be multiplied by; one where None.
    """
    factors = factors if factors is not None else [1.0] * len(deltas)
    if election == "ties":
        merged = merge_weighted(deltas, weights, normalize=divides(election, normalize), factors=factors)
        return base.add_(merged, alpha=scale)
    shares = share_of_weights(weights) if normalize else weights
    return task_arithmetic(base, deltas, [share * factor for share, factor in zip(shares, factors, strict=True)], scale)


def check_fused_weights(weights: Sequence[float], election: Election, normalize: bool | None) -> None:
    """Raise `ConfigError` where `fuse` would divide by weights that can't be divided by."""
    if divides(election, normalize):
        require_one_sign(weights)


def divides(election: Election, normalize: bool | None) -> bool:
    """Tell whether `fuse` divides by weights."""
    return election == "ties" if normalize is None else normalize
