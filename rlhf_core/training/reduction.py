"""The one place where sums become averages, over all micro-batches and processes of an optimiser step.

A method says for each loss term t its sum over a micro-batch, s_tm, and what it is averaged over, w_tm. With M micro-batches
on all processes, the step's loss is

    L = Σ_t ( Σ_m s_tm / Σ_m w_tm )

so each micro-batch contributes Σ_t s_tm / W_t with the global W_t = Σ_m w_tm, which is known before the first backward pass.
Averaging per micro-batch first (a mean of means) would give the tokens of small micro-batches larger weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rlhf_core.infra.errors import PluginError
from rlhf_core.training.distribution import Distribution


def total_weights(parts: Iterable[Mapping[str, float]], names: Sequence[str], *, place: str) -> dict[str, float]:
    """Return the weights of micro-batches added up, by term.

    Args:
        parts: what `Trainer.weights` returned for each micro-batch.
        names: the terms that each of them must have.
        place: the method's name, for messages.

    Raises:
        PluginError: a micro-batch names other terms than `names`, or gives a weight that is negative or not finite.
    """
    totals = dict.fromkeys(names, 0.0)
    for part in parts:
        if set(part) != set(names):
            raise PluginError(
                "the terms differ between micro-batches",
                place=f"{place}.weights",
                got=sorted(part),
                fix=f"return the same terms for every batch: {sorted(names)}",
            )
        for name, weight in part.items():
            value = float(weight)
            if not (math.isfinite(value) and value >= 0):
                raise PluginError(
                    f"the weight of `{name}` must be finite and not negative", place=f"{place}.weights", got=value
                )
            totals[name] += value
    return totals


def objective(terms: Mapping[str, Tensor], weights: Mapping[str, float], *, place: str) -> Tensor | None:
    """Return a micro-batch's share of the step's loss, Σ_t s_t / W_t; None where every W_t is zero.

    A term of zero weight (everything masked) contributes nothing, whatever its sum is.

    Args:
        terms: scalar sums with gradient, by name.
        weights: the step's global weights W_t, by name.

    Raises:
        PluginError: the names of `terms` and `weights` differ, or a term is not a scalar.
    """
    if set(terms) != set(weights):
        raise PluginError(
            "`loss` and `weights` name different terms",
            place=place,
            got=f"loss {sorted(terms)}, weights {sorted(weights)}",
            fix="return one weight for each term",
        )
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.numel() != 1:
            got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise PluginError(
                f"term `{name}` must be the sum of a micro-batch, one number", place=f"{place}.loss", got=got
            )
    shares = [terms[name].reshape(()) / weights[name] for name in sorted(terms) if weights[name] > 0]
    if len(shares) == 1:
        return shares[0]
    return torch.stack(shares).sum() if shares else None


class Tally:
    """Adds up named pairs (sum, count); values stay on the device until they are read.

    A tensor of several entries is replaced by their sum.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._pairs: list[tuple[Tensor | float, Tensor | float]] = []

    def add(self, pairs: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Add (sum, count) by name to what was added under that name before."""
        for name, (total, count) in pairs.items():
            self._names.append(name)
            self._pairs.append((_detached(total), _detached(count)))

    def clear(self) -> None:
        """Remove what was added."""
        self._names.clear()
        self._pairs.clear()

    @property
    def values(self) -> list[Tensor | float]:
        """Every sum and count that was added: sum, count, sum, count, …"""
        return [value for pair in self._pairs for value in pair]

    def totals(self, values: Sequence[float] | None = None) -> dict[str, tuple[float, float]]:
        """Return (sum, count) by name, added up in float64 in the order of the calls of `add`.

        Args:
            values: the property `values` as numbers, where the caller has read them from the device already.
        """
        values = numbers(self.values) if values is None else values
        totals: dict[str, tuple[float, float]] = {}
        for name, total, count in zip(self._names, values[::2], values[1::2], strict=True):
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + total, before[1] + count)
        return totals


def quotients(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return sum / count by name, without names whose count is zero."""
    return {name: total / count for name, (total, count) in totals.items() if count}


def sum_pairs(distribution: Distribution, pairs: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return (sum, count) by name, added up over the processes; one process may have names that another doesn't."""
    totals: dict[str, tuple[float, float]] = {}
    for part in distribution.gather(pairs):
        for name, (total, count) in part.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + total, before[1] + count)
    return totals


def _detached(value: Tensor | float) -> Tensor | float:
    """Return a number, or a scalar tensor without gradient, for a number or a tensor of any shape, whose entries are summed."""
    if not isinstance(value, Tensor):
        return float(value)
    return value.detach().sum() if value.ndim else value.detach()


def numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Return scalar values as numbers, read from a device in one transfer per dtype, since the host waits for each transfer."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    found = [0.0] * len(values)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            groups.setdefault((value.device, value.dtype), []).append(index)
        else:
            found[index] = value
    for indices in groups.values():
        read = torch.stack([values[index] for index in indices]).tolist()  # type: ignore[misc]
        for index, number in zip(indices, read, strict=True):
            found[index] = float(number)
    return found
