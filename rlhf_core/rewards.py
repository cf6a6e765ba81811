"""Plain functions as rewards, and the check that every reward's scores pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf_core.errors import PluginError, shortened
from rlhf_core.interfaces import RewardFn, Sample

RewardFunction = Callable[..., Sequence[float]]
"""`f(prompts, completions, **columns) -> one float a completion`: the habit of the field. An array or tensor will do."""

_NAMED = 8
"""Rows that a message names at most."""


class FunctionReward(RewardFn):
    """A plain function as a reward.

    Args:
        function: called with the prompts, the completions, and each column that all samples have, as lists by name.
    """

    api = 1

    def __init__(self, function: RewardFunction) -> None:
        super().__init__()
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def score(self, samples: Sequence[Sample]) -> list[float]:
        shared = set.intersection(*(set(sample.columns) for sample in samples)) if samples else set()
        columns: dict[str, list[Any]] = {
            name: [sample.columns[name] for sample in samples] for name in sorted(shared - {"prompts", "completions"})
        }
        if not samples:
            return []
        found = _plain(self.function([s.prompt for s in samples], [s.completion for s in samples], **columns))
        # What can't be gone through, such as None or a single number, is told by `checked_scores`.
        return list(found) if isinstance(found, Iterable) else found


def as_reward(reward: RewardFn | RewardFunction) -> RewardFn:
    """Return a reward for whatever is accepted as one: a `RewardFn`, or a function."""
    return reward if isinstance(reward, RewardFn) else FunctionReward(reward)


def checked_scores(reward: RewardFn, samples: Sequence[Sample], *, rows: Sequence[int] | None = None) -> list[float]:
    """Return a reward's scores of the samples, as floats. A list is what it promises; an array or tensor is taken all the same.

    Args:
        rows: each sample's row in its data, for messages.

    Raises:
        PluginError: the reward raises, or gives another number of scores, or one that is no finite number. Names it and the row;
            where it raises, all rows that it was given.
    """
    name = getattr(reward, "name", type(reward).__name__)
    try:
        scores = _plain(reward.score(samples))
    except PluginError:
        raise
    except Exception as error:
        place = f"reward `{name}`" + (f", {_named(rows)}" if rows is not None and len(rows) else "")
        raise PluginError("the reward raised an error", place=place, got=f"{type(error).__name__}: {error}") from error
    if scores is None:
        raise PluginError("the reward returned None", place=f"reward `{name}`", fix="return one number a sample")
    if not isinstance(scores, Sequence) or len(scores) != len(samples):
        got = f"{len(scores)} scores" if isinstance(scores, Sequence) else type(scores).__name__
        raise PluginError(f"expected {len(samples)} scores, one a sample", place=f"reward `{name}`", got=got)
    found = []
    for number, score in enumerate(scores):
        if (value := _finite(_plain(score))) is None:
            where = f"row {rows[number]}" if rows is not None else f"sample {number}"
            raise PluginError(
                "a score must be a finite number", place=f"reward `{name}`, {where}", got=shortened(score)
            )
        found.append(value)
    return found


def _plain(value: Any) -> Any:
    """Return what an array, a tensor or one of their scalars holds as lists and numbers, other values as they are."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _finite(score: Any) -> float | None:
    try:
        value = float(score) if isinstance(score, int | float) else math.nan
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _named(rows: Sequence[int]) -> str:
    """Return rows as a message names them: each once, in their order."""
    once = [str(row) for row in dict.fromkeys(rows)]
    if len(once) == 1:
        return f"row {once[0]}"
    return f"rows {', '.join(once[:_NAMED])}" + (f" and {len(once) - _NAMED} more" if len(once) > _NAMED else "")
