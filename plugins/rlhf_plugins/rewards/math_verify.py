"""Whether a completion's answer is mathematically equal to the reference answer, by the library math-verify."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib import metadata
from typing import Any, Literal

from pydantic import Field

from rlhf_core.plugin import (
    AnswerReward,
    AnswerRewardConfig,
    CallFailure,
    ChildCalls,
    ConfigError,
    FinalAnswer,
    WrittenNumber,
    number_of,
    read_number,
    shared_calls,
    shortened,
)

log = logging.getLogger(__name__)

_MOST_CHARACTERS = 1000
"""A longer marked answer is none; of a longer unmarked text the end is read."""
_MEMORY = 4 << 30
_ROUNDING = Fraction(5, 10**7)
"""Largest difference between a number and one that was written with decimals, as in math-verify's six decimals."""


class MathVerifyConfig(AnswerRewardConfig):
    """Options of the reward by math-verify."""

    seconds: float = Field(
        5.0,
        gt=0,
        description="Time limit of comparing one answer; larger lets harder expressions be simplified. Beyond it the answer"
        " counts as unreadable.",
    )
    unreadable_reference: Literal["error", "text"] = Field(
        "error",
        description="What a reference answer means that the library can't read: an error that names its row, or (`text`) that"
        " only the same text is right.",
    )
    processes: int = Field(
        4, ge=1, description="Most child processes that compare answers; more are faster where there are processors."
    )


class MathVerifyReward(AnswerReward):
    """Scores 1 if the completion's answer is mathematically equal to the reference answer, else 0, by the library math-verify.

    Fractions, roots, sets, intervals, tuples, matrices, equations and expressions are read from LaTeX and compared by SymPy;
    50% equals 0.5 and 50. Answers that are plain numbers or plain words on both sides are compared without the library, which
    takes `2 1/2` for 3/2, and words for products of letters, equal to their anagrams. Needs `pip install 'rlhf-core[math]'`.

    The library's own time limits work in main threads alone and end no large power. Here it runs in child processes, which are
    ended at `seconds`, so that an answer such as `9^{9^{9}}` costs its own score only.
    """

    api = 1
    runs_in = "thread"  # which waits for child processes
    Config = MathVerifyConfig
    config: MathVerifyConfig
    _warned = False

    @cached_property
    def _calls(self) -> ChildCalls:
        return shared_calls(
            f"{__name__}:grade",
            setup=f"{__name__}:import_library",
            seconds=self.config.seconds,
            memory=_MEMORY,
            processes=self.config.processes,
        )

    def prepare(self) -> None:
        self.describe()
        self._calls.start()

    def describe(self) -> dict[str, Any]:
        """Return the library's version, on which scores depend.

        Raises:
            ConfigError: the library isn't installed.
        """
        try:
            return {"math-verify": metadata.version("math-verify")}
        except metadata.PackageNotFoundError:
            fix = "pip install 'rlhf-core[math]'"
            raise ConfigError(
                "the library math-verify isn't installed", place="reward `math_verify`", fix=fix
            ) from None

    def read(self, references: Sequence[str]) -> list[str | None]:
        """Return the references that are numbers, words, or something that the library reads; None for others."""
        if self.config.unreadable_reference == "text":
            return list(references)
        asked = [text for text in references if read_number(text) is None and words_of(text) is None]
        outcomes = self._calls([[text, "boxed", []] for text in asked])
        unread = {
            text for text, one in zip(asked, outcomes, strict=True) if one is None or isinstance(one, CallFailure)
        }
        return [None if text in unread else text for text in references]

    def compare(self, answers: Sequence[tuple[FinalAnswer, Sequence[str]]]) -> list[bool | None]:
        decided: dict[tuple[FinalAnswer, tuple[str, ...]], bool | None] = {}
        asked = {}
        for answer, references in answers:
            verdicts = [equal_plainly(answer, reference) for reference in references]
            key = (answer, tuple(references))
            if any(verdicts):
                decided[key] = True
            elif None not in verdicts:
                decided[key] = False
            elif answer.marked and len(answer.text) > _MOST_CHARACTERS:
                decided[key] = None
            else:
                open_ones = [text for text, verdict in zip(references, verdicts, strict=True) if verdict is None]
                asked[key] = [answer.text[-_MOST_CHARACTERS:], answer.how, open_ones]
        outcomes = self._calls(list(asked.values()))
        for key, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, CallFailure):
                self._warn(key[0].text, outcome)
            decided[key] = None if isinstance(outcome, CallFailure) else outcome
        return [decided[answer, tuple(references)] for answer, references in answers]

    def _warn(self, answer: str, failure: CallFailure) -> None:
        """Report the first answer that the library couldn't compare."""
        if not self._warned:
            self._warned = True
            why = f"{failure.why} {failure.text}".strip()
            log.warning(
                "reward `math_verify`: an answer can't be compared (%s, limit %g s) and counts as unreadable (reported once): %s",
                why, self.config.seconds, shortened(answer),
            )  # fmt: skip


def equal_plainly(answer: FinalAnswer, reference: str) -> bool | None:
    """Tell whether an answer is the reference, the same number or words; None where not both are numbers or both words."""
    if _unwrapped(answer.text) == _unwrapped(reference):
        return True
    if (right := read_number(reference)) is not None:
        # Of a text that marks nothing, the library finds the last formula.
        number = read_number(answer.text) if answer.how == "text" else number_of(answer)
        return None if number is None else _same_number(number, right)
    words = words_of(answer.text), words_of(reference)
    return None if None in words else words[0] == words[1]


def _same_number(one: WrittenNumber, other: WrittenNumber) -> bool:
    """Tell whether two numbers are equal, a percent sign standing for hundredths or left out, and decimals rounded."""
    values = [(one.value / (100 if one.percent else 1), other.value / (100 if other.percent else 1))]
    if one.percent != other.percent:
        values.append((one.value, other.value))
    rounding = _ROUNDING if one.rounded or other.rounded else 0
    return any(abs(first - second) <= rounding for first, second in values)


_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s?\{([^{}\\]*)\}")


def _unwrapped(text: str) -> str:
    """Return a text without `\\text{…}` and delimiters around it, its runs of blanks made one."""
    return " ".join(_TEXT.sub(r"\1", text).strip(" $.").split())


def words_of(text: str) -> str | None:
    """Return a text that is words, one of at least three letters, in small letters; None for any other."""
    plain = _unwrapped(text).casefold()
    words = re.split(r"[ '-]", plain)
    return (
        plain if len(plain) <= _MOST_CHARACTERS and max(map(len, words)) > 2 and all(map(str.isalpha, words)) else None
    )


def import_library() -> None:
    """Import math-verify in the child process, and silence it: its warnings are about time limits that are set here."""
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.CRITICAL)
    grade("1", "boxed", ["2"])


def grade(answer: str, how: str, references: Sequence[str]) -> bool | None:
    """Tell whether an answer equals one of the references, by the library; None where the answer can't be read."""
    from math_verify import verify

    parsed = _parsed(answer, how)
    # What the library can't parse it returns as text.
    if all(isinstance(one, str) for one in parsed):
        return None
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}
    return any(verify(_parsed(one, "boxed"), parsed, **options) for one in references)


@lru_cache(10_000)
def _parsed(text: str, how: str) -> Any:
    """Return what the library reads a text as: a list, which is empty where it reads nothing."""
    from math_verify import parse

    text = _tidy(text)
    formula = how in ("boxed", "tag", "hashes") or (how == "stated" and not re.search(r"\$|\\[(\[]|[a-z]{3}", text))
    return parse(f"\\boxed{{{text}}}" if formula else text, parsing_timeout=None)


def _tidy(text: str) -> str:
    """Return a text without what the library stumbles over: currency signs, a final full stop, symbols of Unicode."""
    for pattern, replacement in _TIDIED:
        text = pattern.sub(replacement, text)
    return text.strip()


_TIDIED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$", ""),
        (r"^\$([^$]*)\$$", r"\1"),
        (r"(?<=[\w)}])\s*\.\s*$", ""),
        ("\N{MINUS SIGN}|–", "-"),
        (r"\\varnothing", r"\\emptyset"),
        ("π", r"\\pi "),
        ("∞", r"\\infty "),
        ("≤", r"\\leq "),
        ("≥", r"\\geq "),
        ("∪", r"\\cup "),
        ("∈", r"\\in "),
        ("[×·]", r"\\cdot "),
        ("÷", r"\\div "),
        ("°", r"^\\circ "),
        (r"√\s?(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"√\s?\(([^()]*)\)", r"\\sqrt{\1}"),
    )
]
