"""Metrics with one entry per prompt, (P,): added up over micro-batches, kept row by row, and their standard errors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Pair
from rlhf_core.infra.errors import PluginError
from rlhf_core.infra.statistics import ratio_standard_error
from rlhf_core.training.reduction import Tally

Entries = dict[str, list[list[Any]]]
"""By metric, [row, prompt, sum, count] of each row that was scored; values are what JSON can hold."""


_PROMPT_NUMBER = "_prompt_number"
"""The column that holds each prompt's place in the batch that an evaluation began with."""


def number_prompts(batch: Batch) -> Batch:
    """Return the batch with a column from which `MetricsByPrompt` knows each prompt again in any micro-batch of it."""
    return batch.attach(per_prompt={_PROMPT_NUMBER: torch.arange(batch.num_prompts, device=batch.device)})


class MetricsByPrompt:
    """Adds up the metrics of a batch's micro-batches; those with one entry per prompt, prompt by prompt.

    Args:
        prompts: how many prompts the batch has, which `number_prompts` numbered.
    """

    def __init__(self, prompts: int) -> None:
        self._prompts = prompts
        self._plain = Tally()
        self._entries: dict[str, Tensor] = {}
        """By metric, (prompts, 2) float64: sum and count of each prompt."""

    def add(self, micro: Batch, metrics: Mapping[str, Pair]) -> None:
        """Add the metrics of a micro-batch."""
        for name, (total, count) in metrics.items():
            if not (isinstance(total, Tensor) and total.ndim and _PROMPT_NUMBER in micro.per_prompt):
                self._plain.add({name: (total, count)})
                continue
            if tuple(total.shape) != (micro.num_prompts,):
                self._entries[name] = total  # `MetricsByRow` refuses its shape, with the method's name
                continue
            table = self._entries.setdefault(name, torch.zeros(self._prompts, 2, dtype=torch.float64))
            pairs = torch.stack([total, _count_per_prompt(total, count)], dim=1)
            table.index_add_(0, micro[_PROMPT_NUMBER].cpu(), pairs.double().cpu())

    def pairs(self) -> dict[str, Pair]:
        """Return (sum, count) by name: numbers, or (prompts,) each for a metric with one entry per prompt."""
        of_prompts: dict[str, Pair] = {
            name: (table[:, 0], table[:, 1]) if table.shape == (self._prompts, 2) else (table, 1.0)
            for name, table in self._entries.items()
        }
        return {**self._plain.totals(), **of_prompts}


class MetricsByRow:
    """Keeps the metrics with one entry per prompt of a whole held-out set, row by row.

    Args:
        place: the method's name, for messages.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.entries: Entries = {}

    def add(self, batch: Batch, metrics: Mapping[str, Pair]) -> None:
        """Add the metrics of a batch; those that are one number are left out.

        Raises:
            PluginError: a metric has neither one entry nor one per prompt.
        """
        prompts: list[str] = []
        for name, (sums, counts) in metrics.items():
            if not isinstance(sums, Tensor) or sums.ndim == 0:
                continue
            if tuple(sums.shape) != (batch.num_prompts,):
                raise PluginError(
                    f"metric `{name}` must be one number, or one entry per prompt",
                    place=self.place,
                    got=f"shape {tuple(sums.shape)} for {batch.num_prompts} prompts",
                )
            prompts = prompts or _prompt_keys(batch)
            rows = zip(batch.rows, prompts, sums.tolist(), _count_per_prompt(sums, counts).tolist(), strict=True)
            self.entries.setdefault(name, []).extend(map(list, rows))


def _count_per_prompt(sums: Tensor, counts: Tensor | float) -> Tensor:
    """Return (P,) counts beside (P,) sums; one count of all prompts is divided evenly among them."""
    if isinstance(counts, Tensor) and counts.ndim:
        return counts
    return torch.full(sums.shape, float(counts) / max(sums.numel(), 1), device=sums.device)


def merge_entries(parts: Iterable[Entries]) -> Entries:
    """Return the entries of all processes as one, in the order of their rows."""
    merged: Entries = {}
    for part in parts:
        for name, entries in part.items():
            merged.setdefault(name, []).extend(entries)
    return {name: sorted(entries, key=lambda entry: entry[0]) for name, entries in merged.items()}


def row_values(entries: Entries) -> dict[str, Tensor]:
    """Return sum / count of each row by metric, (rows,) float64; rows whose count is zero are left out."""
    return {
        name: torch.tensor([total / count for _, _, total, count in of_name if count], dtype=torch.float64)
        for name, of_name in entries.items()
    }


def standard_errors(entries: Entries) -> dict[str, float]:
    """Return by metric the standard error of Σ sum / Σ count (`ratio_standard_error`); rows of one prompt are one cluster."""
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


def _prompt_keys(batch: Batch) -> list[str]:
    """Return a hash of each prompt's token ids, by which equal prompts of different rows are one cluster."""
    ids, lengths = batch.prompt_ids.cpu(), batch.prompt_lengths.tolist()
    return [hashlib.sha256(ids[i, :length].numpy().tobytes()).hexdigest()[:32] for i, length in enumerate(lengths)]
