"""Whether a completion matches a regular expression."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import (
    BaseConfig,
    CallFailure,
    ChildCalls,
    RewardFn,
    Sample,
    SampleError,
    Thinking,
    after_thinking,
    column_of,
    shared_calls,
    shortened,
)

log = logging.getLogger(__name__)


class RegexConfig(BaseConfig):
    """Options of the reward for matches. Either `pattern` or `column` is set."""

    pattern: str | None = Field(None, description="Regular expression of Python's `re`, the same for all rows.")
    column: str | None = Field(None, description="Column of each row's own regular expression.")
    where: Literal["full", "search", "start", "end"] = Field(
        "full",
        description="What must match: the whole completion (`full`), any part of it (`search`), its `start`, or its `end`."
        " Whitespace around the completion is ignored.",
    )
    ignore_case: bool = Field(False, description="Whether capitals and small letters are the same.")
    dot_all: bool = Field(True, description="Whether `.` matches line breaks, too.")
    thinking: Thinking = Field(
        "ignore",
        description="`auto` matches what follows `</think>`, if there is one; `required` nothing without it; `ignore` all text.",
    )
    seconds: float = Field(
        1.0, gt=0, description="Time limit of one match; larger lets slow patterns finish. Beyond it nothing matches."
    )

    @model_validator(mode="after")
    def _consistent(self) -> RegexConfig:
        if (self.pattern is None) == (self.column is None):
            raise ValueError("set either `pattern` or `column`")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"`pattern` is no regular expression: {error}") from None
        return self


class RegexReward(RewardFn):
    """Scores 1 if the completion matches a regular expression, else 0.

    The whole completion must match unless `where` says otherwise, so that a pattern for a format isn't fulfilled by a part of
    the text. Matches are made in a child process: some patterns take exponential time on some texts, which a model finds.
    """

    api = 1
    runs_in = "thread"  # which waits for child processes
    Config = RegexConfig
    config: RegexConfig
    _warned = False

    @cached_property
    def _calls(self) -> ChildCalls:
        return shared_calls(f"{__name__}:matches", seconds=self.config.seconds)

    def prepare(self) -> None:
        self._calls.start()

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return 1 for each completion that matches, else 0.

        Raises:
            SampleError: a row lacks the column of its pattern, or it is no regular expression.
        """
        config = self.config
        calls = []
        for number, sample in enumerate(samples):
            text = after_thinking(sample.completion, config.thinking)
            pattern = self._pattern(sample, number)
            calls.append([pattern, config.where, config.ignore_case, config.dot_all, text])
        found = self._calls(calls)
        slow = [number for number, one in enumerate(found) if isinstance(one, CallFailure)]
        if slow and not self._warned:
            self._warned = True
            log.warning(
                "reward `regex`: a match failed (%s after %g s) and counts as none (reported once): %s",
                found[slow[0]].why, config.seconds, shortened(calls[slow[0]][0]),
            )  # fmt: skip
        return [float(one is True) for one in found]

    def _pattern(self, sample: Sample, number: int) -> str:
        """Return the pattern of a sample; `number` is its index, for messages."""
        if self.config.column is None:
            return str(self.config.pattern)
        pattern = column_of(sample, self.config.column, number)
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise SampleError(
                f"isn't a regular expression: {error}",
                sample=number,
                place=f"column `{self.config.column}`",
                got=shortened(pattern),
            ) from None
        return str(pattern)


def matches(pattern: str, where: str, ignore_case: bool, dot_all: bool, text: str | None) -> bool:
    """Tell whether a text matches a pattern; None never does."""
    if text is None:
        return False
    compiled = re.compile(pattern, (re.IGNORECASE if ignore_case else 0) | (re.DOTALL if dot_all else 0))
    text = text.strip()
    if where == "end":  # not the pattern with `\Z` added: one that begins with flags, `(?i)`, can't be put into a group
        return any(compiled.fullmatch(text, begin) for begin in range(len(text) + 1))
    match = {"full": compiled.fullmatch, "start": compiled.match, "search": compiled.search}[where]
    return match(text) is not None
