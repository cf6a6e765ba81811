"""Karcher mean: the weighted mean of models' directions on the sphere, with the weighted mean of their norms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from torch import Tensor

from rlhf_core.plugin import Chunk, Merger, TensorStream, share_of_weights
from rlhf_plugins.mergers.gram import cosines, gram_matrix
from rlhf_plugins.mergers.linear import linear

STEPS = 200
"""Iterations after which there is taken to be no mean."""
_TOLERANCE = 1e-7
"""Length below which a step, in radians, or a sum of unit vectors counts as zero."""
_OPPOSITE = 1e-9
"""How near -1 the cosine of the angle between opposite vectors is."""


def sphere_mean(cosine: numpy.ndarray, shares: numpy.ndarray) -> numpy.ndarray | None:
    """Return the coefficients c of the mean m = Σ cᵢ uᵢ of unit vectors on the sphere, (K,); None where there is none.

    Karcher 1977, Riemannian center of mass and mollifier smoothing; Wang et al. 2026 (arXiv 2603.04972) for models. The mean is
    where Σ wᵢ log_m(uᵢ) vanishes, with log_m(u) = θ / sin θ · (u - cos θ m), cos θ = ⟨m, u⟩: iterated m ← exp_m(Σ wᵢ log_m(uᵢ))
    starting at the normalised weighted mean. m and all log maps lie in the span of the vectors, so the iteration needs their
    cosines only. There is no mean where the weighted mean is zero or a uᵢ lies opposite to m.

    Args:
        cosine: ⟨uᵢ, uⱼ⟩, (K, K).
        shares: wᵢ, all above zero, of sum one, (K,).
    """
    factors = shares
    for _ in range(STEPS):
        length = _norm(factors, cosine)
        if length < _TOLERANCE:
            return None
        factors = factors / length
        towards = (cosine @ factors).clip(-1.0, 1.0)
        if towards.min() < _OPPOSITE - 1:
            return None
        angles = numpy.arccos(towards)
        pulls = shares / numpy.sinc(angles / numpy.pi)  # w θ / sin θ, and w at θ = 0
        step = pulls - (pulls @ towards) * factors
        angle = _norm(step, cosine)
        if angle < _TOLERANCE:
            return factors
        factors = numpy.cos(angle) * factors + numpy.sin(angle) / angle * step
    return None


def karcher(gram: numpy.ndarray, shares: Sequence[float]) -> list[float]:
    """Return the coefficients a of the mean Σ aᵢ xᵢ: its direction is the mean of the directions, its norm Σ wᵢ |xᵢ|.

    A zero vector has no direction: the mean's direction is that of the others alone, while its norm of zero counts. Where the
    directions have no mean (they are opposite, or the iteration doesn't converge), the coefficients are the shares: the weighted
    mean of the vectors, as in slerp.

    Args:
        gram: ⟨xᵢ, xⱼ⟩, (K, K).
        shares: wᵢ, of sum one, none below zero.
    """
    weights, norms = numpy.asarray(shares), numpy.sqrt(numpy.diag(gram))
    live = (weights > 0) & (norms > 0)
    if not live.any():
        return list(shares)
    mean = sphere_mean(cosines(gram)[numpy.ix_(live, live)], weights[live] / weights[live].sum())
    if mean is None:
        return list(shares)
    factors = numpy.zeros_like(norms)
    factors[live] = mean / norms[live] * (weights @ norms)
    return factors.tolist()


def _norm(factors: numpy.ndarray, cosine: numpy.ndarray) -> float:
    """Return |Σ cᵢ uᵢ| of unit vectors, from the coefficients c and the cosines of their angles."""
    return float(numpy.sqrt(max(0.0, factors @ cosine @ factors)))


class KarcherMerger(Merger):
    """Mean of models' directions on the sphere and of their norms (Karcher mean, Wang et al. 2026)."""

    api = 1
    commutative = True
    ignores_base = True

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights of mixed signs, or of sum zero."""
        share_of_weights(weights)

    def measure(self, stream: TensorStream) -> list[float]:
        """Return each model's coefficient in the mean of the whole tensor."""
        return karcher(gram_matrix(chunk.tensors for chunk in stream.chunks()), share_of_weights(stream.weights))

    def merge_chunk(self, chunk: Chunk, measured: list[float]) -> Tensor:
        return linear(chunk.tensors, measured)
