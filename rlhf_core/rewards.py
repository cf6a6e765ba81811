"""Plain functions as rewards, and the check that every reward's scores pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_core.errors import PluginError
from rlhf_core.interfaces import RewardFn, Sample

RewardFunction = Callable[..., Sequence[float]]
"""`f(prompts, completions, **columns) -> one float a completion`: the habit of the field."""


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
        found = self.function([s.prompt for s in samples], [s.completion for s in samples], **columns)
        return list(found)


def as_reward(reward: RewardFn | RewardFunction) -> RewardFn:
    """Return a reward for whatever is accepted as one: a `RewardFn`, or a function."""
    return reward if isinstance(reward, RewardFn) else FunctionReward(reward)


def checked_scores(reward: RewardFn, samples: Sequence[Sample], *, rows: Sequence[int] | None = None) -> list[float]:
    """Return a reward's scores of the samples.

    Args:
        rows: each sample's row in its data, for messages.

    Raises:
        PluginError: the reward raises, or gives another number of scores, or one that is no finite number. Names it and the row.
    """
    name = getattr(reward, "name", type(reward).__name__)
    try:
        scores = reward.score(samples)
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(
            "the reward raised an error", place=f"reward `{name}`", got=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(scores, Sequence) or len(scores) != len(samples):
        got = f"{len(scores)} scores" if isinstance(scores, Sequence) else type(scores).__name__
        raise PluginError(f"expected {len(samples)} scores, one a sample", place=f"reward `{name}`", got=got)
    for number, score in enumerate(scores):
        number_like = isinstance(score, int | float) and math.isfinite(score)
        if not number_like:
            where = f"row {rows[number]}" if rows is not None else f"sample {number}"
            raise PluginError("a score must be a finite number", place=f"reward `{name}`, {where}", got=repr(score))
    return [float(score) for score in scores]
