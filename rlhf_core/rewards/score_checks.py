"""What every reward's scores must pass, and what is said where they don't."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.errors import PluginError, RLHFError, describe_error, list_rows, shortened
from rlhf_core.rewards.function_reward import function_name, plain


def checked_scores(
    reward: RewardFn, samples: Sequence[Sample], *, rows: Sequence[int] | None = None, name: str | None = None
) -> list[float]:
    """Return a reward's scores of the samples, as floats. A list is what it promises; an array or tensor is taken all the same.

    Args:
        rows: each sample's row in its data, for messages.
        name: the reward's, for messages.

    Raises:
        PluginError: the reward raises, or gives another number of scores, or one that is no finite number. Names it and the row;
            where it raises, all rows that it was given.
    """
    name = name or name_of(reward)
    with naming(name, rows):
        scores = plain(reward.score(samples))
    if scores is None:
        raise PluginError("the reward returned None", place=f"reward `{name}`", fix="return one number a sample")
    if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != len(samples):
        got = f"{len(scores)} scores" if isinstance(scores, Sequence) else type(scores).__name__
        raise PluginError(f"expected {len(samples)} scores, one a sample", place=f"reward `{name}`", got=got)
    return [_checked(score, name, sample_or_row(number, rows)) for number, score in enumerate(scores)]


def checked_steps(
    reward: RewardFn, samples: Sequence[Sample], *, rows: Sequence[int] | None = None, name: str | None = None
) -> list[list[float]] | None:
    """Return a reward's scores of each sample's steps, as floats; None where it is not step-wise.

    Raises:
        PluginError: as `checked_scores`, of the step.
    """
    name = name or name_of(reward)
    with naming(name, rows):
        found = reward.score_steps(samples)
    if found is None:
        return None
    if not isinstance(found, Sequence) or len(found) != len(samples):
        got = f"{len(found)} lists" if isinstance(found, Sequence) else type(found).__name__
        problem = f"expected {len(samples)} lists of step scores, one a sample"
        raise PluginError(problem, place=f"reward `{name}`", got=got)
    checked = []
    for number, given in enumerate(found):
        where, steps = sample_or_row(number, rows), plain(given)
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise PluginError("step scores must be a list", place=f"reward `{name}`, {where}", got=shortened(steps))
        checked.append([_checked(score, name, f"{where}, step {step}") for step, score in enumerate(steps)])
    return checked


def _checked(score: Any, name: str, where: str) -> float:
    value = plain(score)
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    if math.isfinite(number):
        return number
    fix = "return a number for every sample, such as 0 where the reward doesn't apply" if score is None else None
    raise PluginError(
        "a score must be a finite number", place=f"reward `{name}`, {where}", got=shortened(score), fix=fix
    )


def name_of(reward: RewardFn) -> str:
    """Return a reward's name as metrics and messages show it."""
    return getattr(reward, "name", None) or function_name(type(reward))


@contextlib.contextmanager
def naming(name: str, rows: Sequence[int] | None = None) -> Iterator[None]:
    """Name the reward, and the rows that it was given, in what it raises; an error of ours keeps its kind."""
    place = place_of_rows(name, rows)
    try:
        yield
    except RLHFError as error:
        if f"reward `{name}`" in (error.place or ""):
            raise
        within = f"{place}, {error.place}" if error.place else place
        raise type(error)(error.problem, place=within, got=error.got, fix=error.fix) from error
    except (Exception, SystemExit) as error:
        fix = None
        if isinstance(error, TypeError) and "string ind" in str(error):
            fix = "completions are text here, not chat messages: read `completion`, not `completion[0]['content']`"
        elif "signal only works in main thread" in str(error):
            fix = "train in the main thread, or switch the reward's own time limit by signals off"
        raise PluginError("the reward raised an error", place=place, got=describe_error(error), fix=fix) from error


def place_of_rows(name: str, rows: Sequence[int] | None) -> str:
    return f"reward `{name}`" + (f", {list_rows(rows)}" if rows is not None and len(rows) else "")


def sample_or_row(number: int, rows: Sequence[int] | None) -> str:
    return f"row {rows[number]}" if rows is not None else f"sample {number}"
