"""TIES: trim task vectors, elect a sign for each entry, and average those that agree with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import numpy
import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import (
    BaseConfig,
    Chunk,
    ConfigError,
    Merger,
    TensorStream,
    is_embedding,
    magnitudes,
    require_one_sign,
    tensor_thresholds,
    thresholds,
)

_TINY = float(torch.finfo(torch.float32).tiny)
"""Least divisor: where no entry agrees, the sum and its divisor are zero, and the quotient is to be zero."""


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Return δ with the entries of |δ| below the threshold set to zero; entries at the threshold are kept, however many.

    Yadav et al. 2023, TIES-Merging (arXiv 2306.01708), section 4.1, step 1.

    Args:
        delta: δ, (N,) float32.
        threshold: the k-th largest |δ|; 0 keeps all.
    """
    if threshold <= 0:
        return delta
    below = float(numpy.nextafter(numpy.float32(threshold), numpy.float32(0)))
    return torch.nn.functional.hardshrink(delta, below)


def merge_weighted(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    factors: Sequence[float] | None = None,
) -> Tensor:
    """Return, entry by entry, the weighted mean of the values that agree with the elected sign; zero where none does.

    Yadav et al. 2023, TIES-Merging (arXiv 2306.01708), section 4.1, steps 2 and 3: γ = sgn(Σ wᵢδᵢ), A = {i: sgn(wᵢδᵢ) = γ},
    τ = Σ_A wᵢδᵢ / Σ_A |wᵢ|. Deviation: weights wᵢ, applied before the election; at wᵢ = 1 this is the paper's mean.

    Args:
        deltas: trimmed task vectors, each (N,) float32; overwritten.
        weights: wᵢ, of one sign where `normalize`.
        normalize: divide by the agreeing weights; else τ = Σ_A wᵢδᵢ.
        factors: what each δᵢ is still to be multiplied by, above zero; 1 where None.
    """
    by = [weight * factor for weight, factor in zip(weights, factors or [1.0] * len(weights), strict=True)]
    values = [delta if factor == 1.0 else delta.mul_(factor) for delta, factor in zip(deltas, by, strict=True)]
    sign = values[0].clone() if len(values) == 1 else torch.add(values[0], values[1])
    for value in values[2:]:
        sign.add_(value)
    sign.sign_()
    # Times the elected sign, values that agree are above zero and the others are clamped to 0; a mask would cost more than the
    # sum.
    for value in values:
        value.mul_(sign).clamp_min_(0.0)
    divisor = _agreeing(values, weights) if normalize else None
    merged = values[0]
    for value in values[1:]:
        merged.add_(value)
    merged.mul_(sign)
    return merged if divisor is None else merged.div_(divisor.clamp_min_(_TINY))


def _agreeing(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return, entry by entry, Σ |wᵢ| over the models whose value there is above zero, (N,)."""
    total = torch.sign(values[0]).mul_(abs(weights[0]))
    part = torch.empty_like(total)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(torch.sign(value, out=part), alpha=abs(weight))
    return total


def merge_unweighted(deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """Return what PEFT's `ties` returns: signs elected without weights, the sum divided by the number that agree.

    γ = sgn(Σ δᵢ), A = {i: sgn(δᵢ) = γ}, τ = Σ_A wᵢδᵢ / |A|; equal to `merge_weighted` where all weights are one.

    Args:
        deltas: trimmed task vectors, each (N,) float32; overwritten.
        weights: wᵢ.
        normalize: divide by the number that agree; else τ = Σ_A wᵢδᵢ.
    """
    elected = torch.zeros_like(deltas[0])
    for delta in deltas:
        elected.add_(delta)
    elected.sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.sign(delta).mul_(elected).clamp_min_(0.0)
        count.add_(agrees)
        total.add_(delta.mul_(agrees), alpha=weight)
    return total.div_(count.clamp_min_(1.0)) if normalize else total


MAJORITIES = {"weighted": merge_weighted, "unweighted": merge_unweighted}
"""How signs are elected and agreeing entries averaged, by the option `majority`."""


class TIESConfig(BaseConfig):
    """Options of TIES."""

    density: float = Field(
        0.2, gt=0, le=1, description="Share of each task vector's entries that is kept; larger trims less."
    )
    scale: float = Field(1.0, description="Factor λ of the merged task vector; larger moves farther from the base.")
    normalize: bool = Field(
        True, description="Divide by the weights that agree; false adds the weighted entries up as they are."
    )
    majority: Literal["weighted", "unweighted"] = Field(
        "weighted",
        description="Signs are elected by weighted entries, and the sum is divided by the agreeing weights; `unweighted` elects"
        " without weights and divides by the number that agree, as PEFT does.",
    )
    trim_scope: Literal["tensor", "global"] = Field(
        "tensor",
        description="Entries are ranked within each tensor, or (`global`, as in the paper) over the whole model without its"
        " embeddings.",
    )


class TIESMerger(Merger):
    """Trim task vectors, elect signs, average the entries that agree (TIES, Yadav et al. 2023)."""

    api = 1
    commutative = True
    Config = TIESConfig
    config: TIESConfig
    needs_base = True
    per_model = ("density",)
    neutral: ClassVar = {"density": 1.0, "scale": 1.0}

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights by which the mean would divide, where they have mixed signs or sum to zero."""
        if self.config.normalize and self.config.majority == "weighted":
            require_one_sign(weights)

    def survey(self, streams: Iterable[TensorStream]) -> list[float] | None:
        """Return each model's smallest |δ| that trimming keeps over the whole model; None where it is found tensor by tensor."""
        if self.config.trim_scope == "tensor":
            return None
        given = [stream.option("density") for stream in streams]
        shares: list[float] = given[0]
        if any(other != shares for other in given):
            raise ConfigError(
                "`density` must be one number per model where entries are ranked over the whole model",
                place="density",
                fix="set `trim_scope: tensor`, or give densities that don't vary by layer",
            )
        return thresholds(lambda: (stream for stream in streams if not is_embedding(stream.name)), magnitudes, shares)

    def measure(self, stream: TensorStream) -> list[float]:
        """Return each model's smallest |δ| that trimming keeps in this tensor."""
        if stream.surveyed is None or is_embedding(stream.name):
            return tensor_thresholds(stream, stream.option("density"))
        return list(stream.surveyed)

    def merge_chunk(self, chunk: Chunk, measured: list[float]) -> Tensor:
        """Return θ₀ + λτ, τ the mean of the trimmed task vectors' entries that agree in sign."""
        trimmed = [trim(delta, threshold) for delta, threshold in zip(chunk.deltas(), measured, strict=True)]
        merged = MAJORITIES[self.config.majority](trimmed, chunk.weights, normalize=self.config.normalize)
        return chunk.origin.add_(merged, alpha=self.config.scale)
