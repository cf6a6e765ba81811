"""SCE: select the entries in which models differ most, weigh models by the size of these, erase those that disagree in sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy
import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger, TensorStream, require_one_sign, tensor_thresholds
from rlhf_plugins.mergers.gram import gram_matrix


def variances(tensors: Sequence[Tensor]) -> Tensor:
    """Return the variance of each entry over the N models, times N; exactly 0 where all are equal.

    Wan et al. 2024, FuseChat (arXiv 2408.07990), Select, ranks entries by it. Computed as Σ (θᵢ - θ̄)² = Σ dᵢ² - (Σ dᵢ)² / N with
    dᵢ = θᵢ - θ₁, which cancels little. Task vectors have the same variance as the models.

    Args:
        tensors: θᵢ, of one shape, float32; not changed.
    """
    total, squares = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for tensor in tensors[1:]:
        apart = tensor - tensors[0]
        total.add_(apart)
        squares.addcmul_(apart, apart)
    return squares.addcmul_(total, total, value=-1 / len(tensors))


def shares_by_size(sizes: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return each model's share of the merge, ηᵢ = wᵢ Σ δᵢ² / Σⱼ wⱼ Σ δⱼ², with sums over the selected entries.

    Wan et al. 2024, FuseChat (arXiv 2408.07990), Calculate. Deviation: weights wᵢ, which are 1 in the paper. All shares are zero
    where all sums are.

    Args:
        sizes: for each model, Σ δᵢ².
        weights: wᵢ, of one sign.
    """
    weighted = [abs(weight) * float(size) for size, weight in zip(sizes, weights, strict=True)]
    total = sum(weighted)
    return [size / total if total > 0 else 0.0 for size in weighted]


def erase_and_merge(deltas: Sequence[Tensor], shares: Sequence[float], weights: Sequence[float]) -> Tensor:
    """Return the mean, weighted by shares, of the entries that agree with the elected sign; zero where none does.

    Wan et al. 2024, FuseChat (arXiv 2408.07990), Erase: γ = sgn(Σ |wᵢ| δᵢ), A = {i: sgn(δᵢ) = γ},
    τ = Σ_A ηᵢδᵢ / Σ_A ηᵢ. As in TIES, the sum is divided by the shares of the models that agree.

    Args:
        deltas: task vectors δᵢ, zero where not selected, each (N,) float32; overwritten.
        shares: ηᵢ.
        weights: wᵢ, of one sign; 1 in the paper.
    """
    votes = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        votes.add_(delta, alpha=abs(weight))
    votes.sign_()
    total, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, share in zip(deltas, shares, strict=True):
        agreeing = delta.mul_(votes).clamp_min_(0.0)  # |δ| where the sign is the elected one
        total.add_(agreeing, alpha=share)
        divisor.add_(agreeing.sign_(), alpha=share)
    return total.mul_(votes).div_(divisor.masked_fill_(divisor == 0, 1.0))


class SCEConfig(BaseConfig):
    """Options of SCE."""

    density: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Share τ of a tensor's entries that is merged, those that differ most between the models; larger changes more"
        " of the base.",
    )


class _Measured(NamedTuple):
    threshold: float
    """The smallest variance of an entry that is selected."""
    shares: list[float]
    """Each model's share of the merge."""


class SCEMerger(Merger):
    """Select by variance, weigh by size, erase what disagrees in sign (SCE, FuseChat, Wan et al. 2024)."""

    api = 1
    commutative = True
    Config = SCEConfig
    config: SCEConfig
    needs_base = True
    models = (2, None)
    neutral: ClassVar = {"density": 1.0}

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights of mixed signs, or of sum zero."""
        require_one_sign(weights)

    def measure(self, stream: TensorStream) -> _Measured:
        """Return the tensor's least selected variance, and each model's share of the merge."""
        (threshold,) = tensor_thresholds(stream, [self.config.density], lambda chunk: [variances(chunk.tensors)])
        sizes = numpy.diag(gram_matrix(_select(chunk, threshold) for chunk in stream.chunks()))
        return _Measured(threshold, shares_by_size(sizes.tolist(), stream.weights))

    def merge_chunk(self, chunk: Chunk, measured: _Measured) -> Tensor:
        selected = _select(chunk, measured.threshold)
        return chunk.origin.add_(erase_and_merge(selected, measured.shares, chunk.weights))


def _select(chunk: Chunk, threshold: float) -> list[Tensor]:
    """Return each model's task vector, with the entries set to zero whose variance over the models is below the threshold."""
    spread = variances(chunk.tensors)
    # Multiplying by 0 and 1 in float32 is far faster than masked filling.
    chosen = torch.ge(spread, threshold, out=spread)
    return [delta.mul_(chosen) for delta in chunk.deltas()]
