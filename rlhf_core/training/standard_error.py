"""How far an average over held-out rows may be off, with rows of one prompt counted as one observation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.errors import PluginError

Pair = tuple[Tensor | float, Tensor | float]


class Clusters:
    """Adds up a method's metrics by prompt, those that it gives one entry a prompt for.

    Args:
        place: the method's name, for messages.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._sums: dict[str, dict[str, list[float]]] = {}

    def add(self, batch: Batch, metrics: Mapping[str, Pair]) -> None:
        """Take the metrics of a micro-batch."""
        keys: list[str] = []
        for name, (values, counts) in metrics.items():
            if not isinstance(values, Tensor) or values.ndim == 0:
                continue
            if tuple(values.shape) != (batch.num_prompts,):
                raise PluginError(
                    f"metric `{name}` must be one number, or one entry a prompt",
                    place=f"{self.place}.loss",
                    got=f"shape {tuple(values.shape)} for {batch.num_prompts} prompts",
                )
            keys = keys or _prompt_keys(batch)
            each = counts / values.numel() if not isinstance(counts, Tensor) or counts.ndim == 0 else counts
            of_name = self._sums.setdefault(name, {})
            for i, (key, value) in enumerate(zip(keys, values.tolist(), strict=True)):
                total = of_name.setdefault(key, [0.0, 0.0])
                total[0] += value
                total[1] += float(each[i] if isinstance(each, Tensor) and each.ndim else each)

    def sums(self) -> dict[str, dict[str, list[float]]]:
        """Return [sum, count] by metric and prompt."""
        return self._sums


def standard_errors(parts: Iterable[Mapping[str, Mapping[str, list[float]]]]) -> dict[str, float]:
    """Return the standard error of each metric's quotient, from the `Clusters.sums` of all processes."""
    merged: dict[str, dict[str, tuple[float, float]]] = {}
    for part in parts:
        for name, sums in part.items():
            of_name = merged.setdefault(name, {})
            for key, (total, count) in sums.items():
                below = of_name.get(key, (0.0, 0.0))
                of_name[key] = (below[0] + total, below[1] + count)
    found = {name: ratio_standard_error(list(sums.values())) for name, sums in merged.items()}
    return {name: error for name, error in found.items() if error is not None}


def ratio_standard_error(clusters: list[tuple[float, float]]) -> float | None:
    """Return the standard error of Σ s_c / Σ n_c over independent clusters (s_c, n_c); None for fewer than two.

    √( C/(C−1) · Σ_c (s_c − r n_c)² ) / N with r = S/N: the linearised variance of a ratio of totals, between clusters
    (Cochran 1977, Sampling Techniques, section 6.3). With one row a cluster it is the usual s/√N.
    """
    count = sum(n for _, n in clusters)
    if len(clusters) < 2 or not count:
        return None
    ratio = sum(s for s, _ in clusters) / count
    spread = sum((s - ratio * n) ** 2 for s, n in clusters)
    return math.sqrt(len(clusters) / (len(clusters) - 1) * spread) / count


def _prompt_keys(batch: Batch) -> list[str]:
    ids, lengths = batch.prompt_ids.cpu(), batch.prompt_lengths.tolist()
    return [
        hashlib.blake2b(ids[i, :length].numpy().tobytes(), digest_size=16).hexdigest()
        for i, length in enumerate(lengths)
    ]
