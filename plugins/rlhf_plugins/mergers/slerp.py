"""Slerp (spherical linear interpolation): interpolate between two models along the arc from one to the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from torch import Tensor

from rlhf_core.plugin import Chunk, ConfigError, Merger, TensorStream, share_of_weights
from rlhf_plugins.mergers.gram import cosines, gram_matrix
from rlhf_plugins.mergers.linear import linear

PARALLEL = 0.9995
"""Cosine from which on linear interpolation is used: in float32 the arc is straight, or, between opposite vectors, undefined."""


def slerp(gram: numpy.ndarray, shares: Sequence[float]) -> list[float]:
    """Return the coefficients (a, b) of a x₀ + b x₁, a point on the arc between two vectors.

    Shoemake 1985, Animating rotation with quaternion curves: a = sin((1 - t) Ω) / sin Ω, b = sin(t Ω) / sin Ω, with Ω the angle
    between the vectors, which here need not have norm one. a = 1 - t, b = t where |cos Ω| > 0.9995 or a vector is zero.

    Args:
        gram: inner products ⟨xᵢ, xⱼ⟩ of the two vectors, (2, 2).
        shares: 1 - t and t; t = 0 gives x₀, t = 1 gives x₁.
    """
    cosine = float(cosines(gram)[0, 1])
    if abs(cosine) > PARALLEL or not gram.diagonal().all():
        return list(shares)
    angle = math.acos(cosine)
    return [math.sin(share * angle) / math.sin(angle) for share in shares]


class SlerpMerger(Merger):
    """Interpolate along the arc between two models, or the base and one model (slerp, Shoemake 1985).

    Two models: t, the position on the arc from the first to the second, is the second's share of the weights, w₂ / (w₁ + w₂); a
    base is not used. One model: the arc starts at the base, and t is the model's weight.
    """

    api = 1
    commutative = True
    models = (1, 2)

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights from which no position on the arc follows."""
        self._shares(weights)

    def measure(self, stream: TensorStream) -> list[float]:
        """Return the coefficients of the arc's two ends for the whole tensor."""
        if len(stream.models) == 1 and stream.base is None:
            raise ConfigError(
                "`slerp` needs two models, or a base and one model",
                place="models",
                got="one model and no base",
                fix="add a model, or a `base`",
            )
        return slerp(gram_matrix(_ends(chunk) for chunk in stream.chunks()), self._shares(stream.weights))

    def merge_chunk(self, chunk: Chunk, measured: list[float]) -> Tensor:
        return linear(_ends(chunk), measured)

    def _shares(self, weights: Sequence[float]) -> list[float]:
        """Return 1 - t and t for the weights of two models, or for the weight of one."""
        if len(weights) > 1:
            return share_of_weights(weights)
        (t,) = weights
        if not 0 <= t <= 1:
            raise ConfigError(
                "with one model, its weight must be from 0 (the base) to 1 (the model)",
                place="weight",
                got=f"{t:g}",
                fix="give a weight from 0 to 1",
            )
        return [1 - t, t]


def _ends(chunk: Chunk) -> list[Tensor]:
    """Return the two ends of the arc: the two models, or the base and the model."""
    return chunk.tensors if len(chunk.tensors) > 1 else [chunk.origin, *chunk.tensors]
