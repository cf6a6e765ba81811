"""Check the scores that rewards return; an error names the reward and the rows."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf_core.contracts.reward import RewardFn, Sample, SampleError, ScoreWithParts
from rlhf_core.infra.errors import PluginError, RemoteError, RLHFError, describe_error, list_rows, shortened, text_of
from rlhf_core.infra.time_limit import TimeLimit, where_raised
from rlhf_core.rewards.background import awaited
from rlhf_core.rewards.function_reward import function_name, plain


def checked_scores(
    reward: RewardFn,
    samples: Sequence[Sample],
    *,
    rows: Sequence[int | str] | None = None,
    name: str | None = None,
    reached: Callable[[int], None] = lambda number: None,
) -> list[float]:
    """Score the samples and return one finite float per sample, in order. The reward may return a list, an array or a tensor.

    Args:
        rows: each sample's row number in its data, for messages.
        name: the reward's name, for messages.
        reached: called before each sample with its number, where the reward scores row by row.

    Raises:
        PluginError: the reward raised, returned another number of scores, or one that isn't a finite number. The message names
            the reward and the row; where the reward raised, all rows that it was given.
    """
    name = name or name_of(reward)
    if not reward.by_row or len(samples) < 2:
        with blame_reward(name, rows):
            scores = reward.score(samples)
            if inspect.isawaitable(scores):
                scores = awaited(scores)
        return _checked_list(scores, len(samples), rows, name)
    found: list[float] = []
    for number, sample in enumerate(samples):
        reached(number)
        row = [number] if rows is None else rows[number : number + 1]
        with blame_reward(name, row, "row" if rows is not None else "sample"):
            scores = reward.score([sample])
            if inspect.isawaitable(scores):
                scores = awaited(scores)
        found += _checked_list(scores, 1, rows, name, first=number)
    return found


async def scores_of_coroutine(
    reward: RewardFn, samples: Sequence[Sample], *, rows: Sequence[int | str] | None, name: str
) -> list[float]:
    """Score the samples as `checked_scores` does, by a reward whose `score` is async, on the running event loop."""
    with blame_reward(name, rows):
        scores = reward.score(samples)
        if inspect.isawaitable(scores):
            scores = await scores
    return _checked_list(scores, len(samples), rows, name)


def _checked_list(scores: Any, count: int, rows: Sequence[int | str] | None, name: str, first: int = 0) -> list[float]:
    """Return what a reward returned for `count` samples as finite floats; `first` is the first sample's number."""
    scores = plain(scores)
    if scores is None:
        raise PluginError("the reward returned None", place=f"reward `{name}`", fix="return one number per sample")
    if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != count:
        got = f"{len(scores)} scores" if isinstance(scores, Sequence) else type(scores).__name__
        fix = "return a list with one number per completion, in their order"
        raise PluginError(f"expected {count} scores, one per sample", place=f"reward `{name}`", got=got, fix=fix)
    checked = [_checked(score, name, sample_or_row(first + number, rows)) for number, score in enumerate(scores)]
    if len({tuple(sorted(getattr(score, "parts", ()))) for score in checked}) > 1:
        raise PluginError("scores have different parts", place=f"reward `{name}`", fix="return the same parts for each")
    return checked


def checked_numbers(scores: Any, count: int, name: str) -> list[float]:
    """Return scores that a reward gave to `count` samples as finite floats; `PluginError` names the reward and the sample."""
    return _checked_list(scores, count, None, name)


def checked_steps(
    reward: RewardFn, samples: Sequence[Sample], *, rows: Sequence[int | str] | None = None, name: str | None = None
) -> list[list[float]] | None:
    """Return for each sample one finite float per step of its completion, or None where the reward isn't step-wise.

    Raises:
        PluginError: as `checked_scores`; the message names the step, too.
    """
    name = name or name_of(reward)
    with blame_reward(name, rows):
        found = reward.score_steps(samples)
        if inspect.isawaitable(found):
            found = awaited(found)
    if found is None:
        return None
    if not isinstance(found, Sequence) or len(found) != len(samples):
        got = f"{len(found)} lists" if isinstance(found, Sequence) else type(found).__name__
        problem = f"expected {len(samples)} lists of step scores, one per sample"
        fix = "return for each completion a list with one number per step"
        raise PluginError(problem, place=f"reward `{name}`", got=got, fix=fix)
    checked = []
    for number, given in enumerate(found):
        where, steps = sample_or_row(number, rows), plain(given)
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise PluginError("step scores must be a list", place=f"reward `{name}`, {where}", got=shortened(steps))
        checked.append([_checked(score, name, f"{where}, step {step}") for step, score in enumerate(steps)])
    return checked


def gives_steps(reward: RewardFn) -> bool:
    """Tell whether a reward gives scores to steps, as far as its class says."""
    inner = getattr(reward, "reward", reward)  # of one that runs in a process
    return isinstance(inner, RewardFn) and type(inner).score_steps is not RewardFn.score_steps


def _checked(score: Any, name: str, where: str) -> float:
    """Return a score as a finite float; `where` names its sample in the error."""
    value = plain(score)
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    if math.isfinite(number):
        if isinstance(value, ScoreWithParts):
            return ScoreWithParts(
                number, {str(part): _checked(one, name, f"{where}, part `{part}`") for part, one in value.parts.items()}
            )
        return number
    fix = "return a number for every sample, such as 0 where the reward doesn't apply"
    raise PluginError(
        "a score must be a finite number", place=f"reward `{name}`, {where}", got=shortened(score), fix=fix
    )


def name_of(reward: RewardFn) -> str:
    """Return the name of a reward in metrics and messages: its `name`, else that of its class."""
    return getattr(reward, "name", None) or function_name(type(reward))


@contextlib.contextmanager
def blame_reward(name: str, rows: Sequence[int | str] | None = None, unit: str = "row") -> Iterator[None]:
    """Turn what a reward raises inside into a `PluginError` that names the reward and the rows; an `RLHFError` keeps its type.

    Args:
        unit: what the numbers in `rows` count: rows of the data, or samples.
    """
    place = place_of_rows(name, rows, unit)
    try:
        yield
    except RLHFError as error:
        if f"reward `{name}`" in (error.place or ""):
            raise
        if isinstance(error, SampleError) and error.sample is not None:
            place = f"reward `{name}`, {sample_or_row(error.sample, rows)}"
        within = f"{place}, {error.place}" if error.place else place
        raise type(error)(error.problem, place=within, got=error.got, fix=error.fix) from error
    except (Exception, SystemExit) as error:
        fix = "mend the reward; `--debug` shows the whole traceback"
        if isinstance(error, TimeLimit):
            raise
        if isinstance(error, TypeError) and "string ind" in text_of(error):
            fix = "completions are text here, not chat messages: read `completion`, not `completion[0]['content']`"
        elif "signal only works in main thread" in text_of(error):
            fix = "run it in the main thread or a process (`runs_in`), or switch its own time limit by signals off"
        got = str(error) if isinstance(error, RemoteError) else describe_error(error)
        if where := where_raised(error.__traceback__):
            got += f" at {where}"
        raise PluginError("the reward raised an error", place=place, got=got, fix=fix) from error


def place_of_rows(name: str, rows: Sequence[int | str] | None, unit: str = "row") -> str:
    """Return where an error belongs: ``reward `exact_match`, rows 4, 7``."""
    if rows is None or not len(rows):
        return f"reward `{name}`"
    return f"reward `{name}`, {list_rows(rows) if unit == 'row' else f'sample {rows[0]}'}"


def sample_or_row(number: int, rows: Sequence[int | str] | None) -> str:
    """Return a sample's row in its data, where rows are known, else its number among the samples."""
    return f"row {rows[number]}" if rows is not None else f"sample {number}"
