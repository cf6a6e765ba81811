"""Model stock: the mean of models, moved towards the base the more their task vectors differ in direction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from torch import Tensor

from rlhf_core.plugin import Chunk, Merger, TensorStream
from rlhf_plugins.mergers.gram import cosines, gram_matrix
from rlhf_plugins.mergers.task_arithmetic import task_arithmetic
from rlhf_plugins.mergers.uniform_soup import require_equal


def stock_ratio(gram: numpy.ndarray) -> float:
    """Return t, the share of the models' mean in θ = t θ̄ + (1 - t) θ₀.

    Jang et al. 2024, Model stock (arXiv 2403.19522), for N models: t = N c / (1 + (N - 1) c), with c the cosine of the angle
    between task vectors, here its mean over all pairs. A mean below zero counts as zero, so that t is 0 and the base is returned:
    the paper's geometry has no answer there, and the formula diverges. A pair with a task vector of zero has the cosine 0.

    Args:
        gram: inner products of the task vectors, ⟨δᵢ, δⱼ⟩, (N, N).
    """
    count = len(gram)
    cosine = max(0.0, float(cosines(gram)[numpy.triu_indices(count, 1)].mean()))
    return count * cosine / (1 + (count - 1) * cosine)


class ModelStockMerger(Merger):
    """Mean of models, moved towards the base the more they differ (model stock, Jang et al. 2024)."""

    api = 1
    commutative = True
    needs_base = True
    models = (2, None)

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights that differ."""
        require_equal(weights, "model_stock")

    def measure(self, stream: TensorStream) -> float:
        """Return t, the share of the models' mean, for the whole tensor."""
        return stock_ratio(gram_matrix(chunk.deltas() for chunk in stream.chunks()))

    def merge_chunk(self, chunk: Chunk, measured: float) -> Tensor:
        # θ₀ + t δ̄, which is exact where t is 0, and rounds less than t θ̄ + (1 - t) θ₀.
        deltas = chunk.deltas()
        return task_arithmetic(chunk.origin, deltas, [1.0] * len(deltas), measured / len(deltas))
