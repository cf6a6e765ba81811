"""Plain functions as rewards, in the field's usual form: `f(prompts, completions, **columns)` → one number per completion."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.code_origin import describe_code
from rlhf_core.infra.errors import ConfigError, PluginError, did_you_mean, shortened

RewardFunction = Callable[..., Any]
"""A callable `f(prompts, completions, **columns)`, possibly async, that returns a list, an array or a tensor."""

log = logging.getLogger(__name__)

SAMPLE_ARGUMENTS: dict[str, Callable[[Sample], Any]] = {
    "prompts": lambda sample: sample.prompt,
    "completions": lambda sample: sample.completion,
    "completion_ids": lambda sample: list(sample.completion_ids),
    "stop_reasons": lambda sample: sample.stop_reason,
}
"""What a function can be passed of each sample, besides the columns of its row, by the argument's name."""

ONE_SAMPLE_ARGUMENTS: dict[str, Callable[[Sample], Any]] = {
    "prompt": lambda sample: sample.prompt,
    "completion": lambda sample: sample.completion,
    "completion_ids": lambda sample: list(sample.completion_ids),
    "stop_reason": lambda sample: sample.stop_reason,
}
"""The same of a function that scores one sample: one whose argument is called `completion`."""


class FunctionReward(RewardFn):
    """A plain function as a reward.

    The function gets a list for each argument that it has of these names: `prompts`, `completions` (text, also where prompts
    are chats), `completion_ids`, `stop_reasons`, and the columns of the rows; all columns where it takes `**columns`. Where no
    argument is named `completions`, the first two arguments get the prompts and the completions. A function with an argument
    `completion` instead scores one sample: it gets `prompt`, `completion`, `completion_ids`, `stop_reason` and the columns of its
    row, and returns one number.

    Args:
        function: a function, sync or async, a bound method, a partial or a callable object.
        options: further keyword arguments of every call.
        place: returns where an option of a name was set, for messages.

    Raises:
        ConfigError: the function can't be called in this way, or has no argument for an option.
    """

    api = 1

    def __init__(
        self,
        function: RewardFunction,
        options: Mapping[str, Any] | None = None,
        *,
        place: Callable[[str], str] | None = None,
    ) -> None:
        super().__init__()
        self.name = function_name(function)
        self.by_row = _scores_one(function)
        self.is_async = is_async(function)
        """Whether the function is async, so that `score` returns a coroutine."""
        self.arguments = ONE_SAMPLE_ARGUMENTS if self.by_row else SAMPLE_ARGUMENTS
        self.options = _checked(
            function, options or {}, place or (lambda name: f"reward `{self.name}`"), self.arguments.keys()
        )
        self.function, self.how = function, _how_to_call(function, self.name, self.arguments.keys())

    def score(self, samples: Sequence[Sample]) -> Any:
        """Return the function's scores as a list; of an async function, a coroutine that returns them."""
        if not samples:
            return _nothing() if self.is_async else []
        if self.by_row:
            calls = [self._call_with([sample]) for sample in samples]
            return _gathered(calls) if any(map(inspect.isawaitable, calls)) else calls
        found = self._call_with(samples)
        return _listed_later(found) if inspect.isawaitable(found) else _listed(found)

    def _call_with(self, samples: Sequence[Sample]) -> Any:
        """Call the function: with lists of the samples' values, or where it scores one sample, with that sample's."""
        named = self._by_name(samples)
        if self.by_row:
            return self.function(**{name: values[0] for name, values in named.items()}, **self.options)
        return self.function(*self._by_position(samples), **named, **self.options)

    def describe(self) -> dict[str, Any]:
        return describe_code(self.function) | ({"options": self.options} if self.options else {})

    def _by_position(self, samples: Sequence[Sample]) -> list[list[Any]]:
        return [[SAMPLE_ARGUMENTS[name](sample) for sample in samples] for name in self.how.first]

    def _by_name(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """Return the keyword arguments of a call: for each name, a list of the samples' values.

        Raises:
            PluginError: the rows lack a column that the function requires, or have one with the name of its first arguments.
        """
        how, columns = self.how, set.intersection(*(set(sample.columns) for sample in samples))
        for name in how.required - self.options.keys() - self.arguments.keys() - columns:
            raise self._no_column(name, samples)
        if mistaken := sorted(columns & set(how.positions)):
            problem = f"the function's first two arguments get prompts and completions, and `{mistaken[0]}` is a column"
            fix = "call the arguments `prompts` and `completions`"
            raise PluginError(problem, place=f"reward `{self.name}`", fix=fix)
        taken = {*how.first, *how.bound, *self.options}
        if hidden := sorted(columns & self.arguments.keys()):
            _warn_of_hidden_column(self.name, hidden[0])
        names = [*self.arguments, *sorted(columns - self.arguments.keys())]
        wanted = [name for name in names if (how.every or name in how.named) and name not in taken]
        return {
            name: [
                self.arguments[name](sample) if name in self.arguments else sample.columns[name] for sample in samples
            ]
            for name in wanted
        }

    def _no_column(self, name: str, samples: Sequence[Sample]) -> PluginError:
        """Return the error for a required argument `name` that is no column of all rows."""
        lacking = [sample for sample in samples if name not in sample.columns]
        problem = f"the function needs a column `{name}`, which " + (
            "the rows don't have" if len(lacking) == len(samples) else f"{len(lacking)} of {len(samples)} rows lack"
        )
        columns = {column for sample in samples for column in sample.columns}
        fix = did_you_mean(name, {*self.arguments, *columns}) if len(lacking) == len(samples) else "give it a default"
        return PluginError(problem, place=f"reward `{self.name}`", fix=fix)


def as_reward(reward: RewardFn | RewardFunction) -> RewardFn:
    """Return a `RewardFn` as it is, and a function as a `FunctionReward`."""
    return reward if isinstance(reward, RewardFn) else FunctionReward(reward)


def function_name(function: RewardFunction) -> str:
    """Return a function's name in metrics and messages; of a partial, that of its function."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "lambda" if name == "<lambda>" else name


def is_async(function: Any) -> bool:
    """Tell whether a function, bound method, partial or callable object is async."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = vars(type(function)).get("__call__", function)
    return inspect.iscoroutinefunction(function)


def plain(value: Any) -> Any:
    """Return an array, a tensor or a scalar of theirs as Python lists and numbers; other values as they are."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _checked(
    function: RewardFunction, options: Mapping[str, Any], place: Callable[[str], str], arguments: Set[str]
) -> dict[str, Any]:
    """Return options validated and converted by the annotations of the function's arguments, but for those in `arguments`.

    Raises:
        ConfigError: the function has no such argument, or the value doesn't fit its annotation.
    """
    if not options:
        return {}
    parameters = _parameters(function) or {}
    known = {name for name, one in parameters.items() if one.kind in _NAMED} - arguments
    hints = _hints(function)
    checked = {}
    for name, value in options.items():
        if name not in known:  # `**columns` doesn't count, for it would accept every misspelling
            fix = did_you_mean(name, known) if known else "leave it out: the function has no options"
            problem = f"the function `{function_name(function)}` has no argument `{name}`"
            raise ConfigError(problem, place=place(name), got=shortened(value), fix=fix)
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value) if name in hints else value
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"].replace("Input should be", "must be")
            raise ConfigError(
                f"argument `{name}` of `{function_name(function)}`: {message}", place=place(name), got=shortened(value)
            ) from None
        except Exception:  # an annotation that pydantic doesn't understand
            checked[name] = value
    return checked


@dataclass(frozen=True)
class _HowToCall:
    """Which arguments a function gets, and how."""

    first: tuple[str, ...]
    """What is passed by position: () or ("prompts", "completions")."""
    positions: tuple[str, ...]
    """The function's own names for these arguments."""
    named: frozenset[str]
    """Arguments that can be passed by name."""
    required: frozenset[str]
    """Those of them without a default."""
    every: bool
    """Whether the function takes any other name, by `**columns`."""
    bound: frozenset[str]
    """Arguments that a partial has set."""


def _scores_one(function: RewardFunction) -> bool:
    """Tell whether a function scores one sample: it has an argument `completion`, and none `completions`."""
    parameters = _parameters(function) or {}
    named = {name for name, one in parameters.items() if one.kind in _NAMED}
    return "completion" in named and "completions" not in named


def _listed(found: Any) -> Any:
    """Return what a function returned as a list; what isn't iterable as it is, for `checked_scores` refuses it."""
    found = plain(found)
    return list(found) if isinstance(found, Iterable) else found


async def _listed_later(found: Awaitable[Any]) -> Any:
    return _listed(await found)


async def _gathered(calls: Sequence[Any]) -> list[Any]:
    return list(await asyncio.gather(*calls))


async def _nothing() -> list[float]:
    return []


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _how_to_call(function: RewardFunction, name: str, arguments: Set[str]) -> _HowToCall:
    """Return which of the samples' values (`arguments`) and columns a function takes, from its signature."""
    parameters = _parameters(function)
    if parameters is None:  # a function written in C, without a signature
        return _HowToCall(("prompts", "completions"), (), frozenset(), frozenset(), False, frozenset())
    bound: set[str] = set()
    inner = function
    while isinstance(inner, functools.partial):
        bound |= inner.keywords.keys()
        inner = inner.func
    kinds = {one.kind for one in parameters.values()}
    every = inspect.Parameter.VAR_KEYWORD in kinds
    named = {key for key, one in parameters.items() if one.kind in _NAMED}
    positions = [key for key, one in parameters.items() if one.kind in _POSITIONAL and key not in bound]
    first: tuple[str, ...] = ()
    # As in TRL, whose functions all take `**columns`, arguments are passed by name; only a function that has none of the names
    # gets two by position.
    if not every and not named & (arguments - {"prompts"}):
        if len(positions) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
            raise ConfigError(
                "the function takes neither `completions` nor two arguments",
                place=f"reward `{name}`",
                got=f"({', '.join(map(str, parameters.values()))})",
                fix="write it as `def f(prompts, completions, **columns)`",
            )
        first = ("prompts", "completions")
        named -= set(positions[:2])
    required = {key for key in named if parameters[key].default is inspect.Parameter.empty}
    return _HowToCall(
        first, tuple(positions[: len(first)]), frozenset(named), frozenset(required - bound), every, frozenset(bound)
    )


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter] | None:
    """Return a function's parameters by name; None where it has no signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _hints(function: RewardFunction) -> dict[str, Any]:
    """Return the annotations of a function's arguments as types; {} where they can't be resolved."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = type(function).__call__
    try:
        return typing.get_type_hints(function)
    except Exception:  # an annotation with a name that exists for type checkers only
        return {}


@functools.lru_cache(maxsize=256)
def _warn_of_hidden_column(reward: str, column: str) -> None:
    log.warning(
        "reward `%s`: the rows' column `%s` isn't passed: that argument gets the samples' own values", reward, column
    )
