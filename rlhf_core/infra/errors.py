"""Errors that a user can cause: one line each, and one exit code per kind.

Everything that a user can cause raises a subclass of `RLHFError`; the command line prints it as
`error[CODE] place: problem; got X; fix: Y` and exits with the class's exit code. Any other exception is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar


class RLHFError(Exception):
    """An error: the problem, its place, what was found there (`got`), how to fix it (`fix`); the last three may be None."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    silent: bool = False
    """Whether another process of the run prints it, so that this one doesn't."""
    also: Sequence[RLHFError] = ()
    """Further mistakes that were found with it, for a caller that shows them all; `line` leaves them out."""

    def __init__(
        self, problem: str, *, place: str | None = None, got: object | None = None, fix: str | None = None
    ) -> None:
        self.problem, self.place, self.got, self.fix = problem, place, got, fix
        super().__init__(problem)

    def __str__(self) -> str:
        text = f"{self.place}: {self.problem}" if self.place else self.problem
        if self.got is not None:
            text += f"; got {self.got}"
        if self.fix:
            text += f"; fix: {self.fix}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling loses keyword-only arguments by default, and errors pass between processes.
        return (_rebuild, (type(self), self.problem, self.place, self.got, self.fix))

    def line(self) -> str:
        """Return the one line that the command line prints to stderr."""
        return printable(f"error[{self.code}] {self}")


class Mistakes(list[RLHFError]):
    """Mistakes that checks find one after the other, to be reported at once.

    mistakes = Mistakes()
    with mistakes.noted():
        check_one_thing()
    with mistakes.noted():
        check_another()
    mistakes.raise_first()
    """

    @contextmanager
    def noted(self) -> Iterator[Mistakes]:
        """Note an `RLHFError` of the block, with its `also`, instead of raising it; gives the list itself."""
        try:
            yield self
        except RLHFError as error:
            self.extend((error, *error.also))

    def raise_first(self) -> None:
        """Raise the first mistake, whose `also` has the others; do nothing where there is none."""
        if self:
            self[0].also = tuple(self[1:])
            raise self[0]


def _rebuild(kind: type[RLHFError], problem: str, place: str | None, got: object, fix: str | None) -> RLHFError:
    return kind(problem, place=place, got=got, fix=fix)


class ConfigError(RLHFError):
    """A wrong configuration, option or name."""

    code, exit_code = "config", 2


class DataError(RLHFError):
    """Data that can't be read, or don't fit their record type."""

    code, exit_code = "data", 3


class ModelError(RLHFError):
    """A model, tokenizer or checkpoint that cannot be used."""

    code, exit_code = "model", 4


class PluginError(RLHFError):
    """A plugin or reward that is broken or ambiguous, or breaks its contract."""

    code, exit_code = "plugin", 5


class NumbersError(RLHFError):
    """Numbers that can't be trained on: a loss or gradient that isn't finite, groups without variance, memory that ran out."""

    code, exit_code = "numbers", 6


class StorageError(RLHFError):
    """Reading or writing failed: a full disk, a directory without write permission."""

    code, exit_code = "io", 7


class LostProcess(RLHFError):
    """Another process of the run has ended, or doesn't answer."""

    code, exit_code = "lost", 7


class Stopped(RLHFError):
    """The run was asked to stop (SIGTERM, Ctrl-C). Its state is saved where it writes checkpoints, and it can be resumed."""

    code, exit_code = "stopped", 75


class Interrupted(RLHFError):
    """Ctrl-C was pressed where there was nothing to save, or for the second time."""

    code, exit_code = "interrupted", 130


class RemoteError(Exception):
    """An error of another process that isn't a user's; its note has the lines where it was raised."""


def error_report(error: BaseException) -> dict[str, Any]:
    """Return what another process needs to raise an error, as JSON values."""
    import traceback  # here, for imports are most of the time that `rlhf list` takes

    report: dict[str, Any] = {
        "text": f"{type(error).__name__}: {text_of(error)}",
        "trace": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, RLHFError):
        got = None if error.got is None else text_of(error.got)
        report["kind"] = type(error).__name__
        report["details"] = {"problem": error.problem, "place": error.place, "got": got, "fix": error.fix}
    elif isinstance(error, OSError):
        report["system"] = [error.errno, error.strerror, error.filename and str(error.filename)]
    return report


def reported_error(report: Mapping[str, Any]) -> Exception:
    """Return the error that `error_report` described: an `RLHFError` or `OSError` as it was, anything else as `RemoteError`."""
    error: Exception = RemoteError(report["text"])
    if "kind" in report:
        kinds = {kind.__name__: kind for kind in _kinds(RLHFError)}
        with suppress(TypeError):  # a class that is made from other arguments
            error = kinds.get(report["kind"], RLHFError)(**report["details"])
    elif "system" in report:
        error = OSError(*report["system"])
    error.add_note(report["trace"])
    return error


def _kinds(kind: type[RLHFError]) -> Iterator[type[RLHFError]]:
    for below in kind.__subclasses__():
        yield from _kinds(below)
    yield kind


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is spelt most like `name`, or None where none is similar."""
    return next(iter(nearest_names(name, choices)), None)


def nearest_names(name: str, choices: Iterable[str], most: int = 3) -> list[str]:
    """Return the choices that are spelt most like `name`, several where they are equally near; [] where none is similar."""
    import difflib  # here, for imports are most of the time that `rlhf list` takes

    folded = {choice.casefold().replace("-", "_"): choice for choice in choices}
    asked = name.casefold().replace("-", "_")
    found = difflib.get_close_matches(asked, folded, n=8, cutoff=0.6)
    # What says more than is meant, as `adamw_torch` does, begins with it.
    if begun := [one for one in found if asked.startswith(f"{one}_")]:
        return [folded[max(begun, key=len)]]
    # difflib takes `rgpo` to be as near to `orpo` as to `grpo`: it doesn't know that letters are swapped.
    slips = {one: _slips(asked, one) for one in found}
    least = min(slips.values(), default=0)
    equal = [one for one in found if slips[one] == least] if least <= 2 else found[:1]
    return [folded[one] for one in equal[:most]]


def _slips(typed: str, meant: str) -> int:
    """Return how many letters must be added, removed, replaced or swapped with the next (optimal string alignment distance)."""
    rows: list[list[int]] = [list(range(len(meant) + 1))]
    for i, letter in enumerate(typed, 1):
        row = [i]
        for j, wanted in enumerate(meant, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == meant[j - 2] and typed[i - 2] == wanted:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def either(names: Iterable[str], mark: str = "`") -> str:
    """Return names as a choice in a message: `a` or `b`, each between marks."""
    return " or ".join(f"{mark}{name}{mark}" for name in names)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a hint for a wrong name: the nearest choices where some are similar, and the sorted list of all."""
    options = sorted(choices)
    near = nearest_names(name, options)
    listed = ", ".join(options) if options else "none"
    return f"did you mean {either(near)}? (known: {listed})" if near else f"use one of: {listed}"


_SPACES = frozenset("\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000")
JOINERS = frozenset("\u200c\u200d")  # words of Persian and Hindi need them, and many emoji
_BREAKS = frozenset("\n\r\t\v\f\x1c\x1d\x1e\x85\u2028\u2029")


def printable(text: str, *, lines: bool = False) -> str:
    """Return text with control and direction characters, which a terminal would act upon, as escapes such as `\\x1b`.

    Line breaks become spaces, so that the text is one line; with `lines`, line feeds and tabs stay.
    """
    if text.isprintable():
        return text
    kept = {"\n", "\t"} if lines else ()
    return "".join(character if character in kept else _shown(character) for character in text.replace("\r\n", "\n"))


def _shown(character: str) -> str:
    """Return a character, or its escape where a terminal would act upon it; a blank for a line break."""
    if character.isprintable() or character in _SPACES or character in JOINERS:
        return character
    return " " if character in _BREAKS else character.encode("unicode_escape").decode("ascii")


def shortened(value: object) -> str:
    """Return a value's `repr`, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe_error(error: BaseException, *, lines: int | None = None) -> str:
    """Return an exception's type and text as one line, such as `KeyError: 'answer'`.

    Args:
        lines: how many non-blank lines of the text to keep; None keeps all of them, up to 500 characters.
    """
    name, text = printable(type(error).__name__), _line_of(error, lines)
    return f"{name}: {text}" if text else name


def first_line(error: BaseException) -> str:
    """Return the first two non-blank lines of an exception's text as one line, or its type's name where it has no text."""
    return _line_of(error, 2) or printable(type(error).__name__)


def text_of(value: object) -> str:
    """Return `str(value)`, or a note in brackets where its `__str__` raises, as that of a foreign exception may."""
    try:
        return str(value)
    except BaseException as error:
        return f"(its text can't be read: {type(error).__name__})"


def _line_of(error: BaseException, lines: int | None) -> str:
    """Return an exception's text as one printable line of at most 500 characters."""
    kept = [line for line in text_of(error).splitlines() if line.strip()][:lines]
    text = " ".join(printable(" ".join(kept)).split())
    return text if len(text) <= 500 else f"{text[:500]}…"


def list_rows(rows: Iterable[int | str], most: int = 8) -> str:
    """Return row numbers or places as a message names them: `row 3`, `rows 4, 2`, `rows 0, 1, 2 and 9 more`; each once."""
    once = [str(row) for row in dict.fromkeys(rows)]
    more = f" and {len(once) - most} more" if len(once) > most else ""
    return f"row{'s' if len(once) != 1 else ''} {', '.join(once[:most])}{more}"
