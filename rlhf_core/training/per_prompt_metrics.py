"""Metrics of held-out rows one by one: their standard errors, and what a method makes of the whole set."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import PluginError

Pair = tuple[Tensor | float, Tensor | float]
Entries = dict[str, list[list[Any]]]
"""By metric, [row, prompt, sum, count] of each row that was scored; values are what JSON can hold."""


class PerPrompt:
    """Keeps a method's metrics row by row, those that it gives one entry a prompt for.

    Args:
        place: the method's name, for messages.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.entries: Entries = {}

    def add(self, batch: Batch, metrics: Mapping[str, Pair]) -> None:
        """Take the metrics of a micro-batch."""
        prompts: list[str] = []
        for name, (sums, counts) in metrics.items():
            if not isinstance(sums, Tensor) or sums.ndim == 0:
                continue
            if tuple(sums.shape) != (batch.num_prompts,):
                raise PluginError(
                    f"metric `{name}` must be one number, or one entry a prompt",
                    place=self.place,
                    got=f"shape {tuple(sums.shape)} for {batch.num_prompts} prompts",
                )
            prompts = prompts or _prompt_keys(batch)
            if not isinstance(counts, Tensor) or counts.ndim == 0:
                counts = torch.full(sums.shape, float(counts) / max(sums.numel(), 1))
            rows = zip(batch.rows, prompts, sums.tolist(), counts.tolist(), strict=True)
            self.entries.setdefault(name, []).extend(map(list, rows))


def merge_entries(parts: Iterable[Entries]) -> Entries:
    """Return the entries of all processes, in the order of their rows."""
    merged: Entries = {}
    for part in parts:
        for name, entries in part.items():
            merged.setdefault(name, []).extend(entries)
    return {name: sorted(entries, key=lambda entry: entry[0]) for name, entries in merged.items()}


def values(entries: Entries) -> dict[str, Tensor]:
    """Return sum / count of each row by metric, (rows,) float64; rows that count nothing are left out."""
    return {
        name: torch.tensor([total / count for _, _, total, count in of_name if count], dtype=torch.float64)
        for name, of_name in entries.items()
    }


def standard_errors(entries: Entries) -> dict[str, float]:
    """Return the standard error of each metric's quotient, rows of one prompt being one observation."""
    found = {}
    for name, of_name in entries.items():
        clusters: dict[str, tuple[float, float]] = {}
        for _, prompt, total, count in of_name:
            below = clusters.get(prompt, (0.0, 0.0))
            clusters[prompt] = (below[0] + total, below[1] + count)
        error = ratio_standard_error(list(clusters.values()))
        if error is not None:
            found[name] = error
    return found


def ratio_standard_error(clusters: list[tuple[float, float]]) -> float | None:
    """Return the standard error of Σ s_c / Σ n_c over independent clusters (s_c, n_c); None for fewer than two.

    √( C/(C−1) · Σ_c (s_c − r n_c)² ) / N with r = S/N: the linearised variance of a ratio of totals, between clusters
    (Cochran 1977, Sampling Techniques, section 6.3). With one row a cluster it is the usual s/√N.
    """
    clusters = [(total, count) for total, count in clusters if count]
    count = sum(n for _, n in clusters)
    if len(clusters) < 2:
        return None
    ratio = sum(s for s, _ in clusters) / count
    spread = sum((s - ratio * n) ** 2 for s, n in clusters)
    return math.sqrt(len(clusters) / (len(clusters) - 1) * spread) / count


def _prompt_keys(batch: Batch) -> list[str]:
    ids, lengths = batch.prompt_ids.cpu(), batch.prompt_lengths.tolist()
    return [hashlib.sha256(ids[i, :length].numpy().tobytes()).hexdigest()[:32] for i, length in enumerate(lengths)]
