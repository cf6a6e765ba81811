"""Flags in the messages of what both the command line and Python call, as Python writes them: `--resume` is `resume=True`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rlhf_core.infra.errors import RLHFError

_COMMAND = re.compile(r"(`rlhf [^`]*`)")
_ALLOWED = re.compile(r"(?<![\w/-])--allow-change ([\w.]+(?:,[\w.]+)*)(?=`)")
_SWITCH = re.compile(r"(?<![\w/-])--(resume|overwrite)\b")
_VALUE = re.compile(r"`--([a-z][\w-]*) ([^`\s]+)`")
_PLAIN = re.compile(r"[\d.e+-]+|[A-Z_]+")
"""Matches numbers, and names that stand for a value."""
_OPTION = re.compile(r"(?<![\w/-])--([a-z][\w.-]*)")


def in_python(text: str) -> str:
    """Return a message with flags as arguments of Python; commands that it tells to run (`rlhf …`) stay as they are."""
    return "".join(part if part.startswith("`rlhf ") else _arguments(part) for part in _COMMAND.split(text))


def _arguments(text: str) -> str:
    text = _ALLOWED.sub(lambda found: f"allow_change={found[1].split(',')!r}".replace("'", '"'), text)
    text = _SWITCH.sub(r"\1=True", text)
    text = _VALUE.sub(_given, text)
    return _OPTION.sub(lambda found: found[1].replace("-", "_"), text)


_FLAGS: ContextVar[bool] = ContextVar("command_line", default=False)
"""Whether the command line calls, whose messages name flags."""


def _given(found: re.Match[str]) -> str:
    """Return a flag with its value as an argument."""
    value = found[2] if _PLAIN.fullmatch(found[2]) else f'"{found[2]}"'
    return f"`{found[1].replace('-', '_')}={value}`"


@contextmanager
def said_for_flags() -> Iterator[None]:
    """Within this context, that of the command line, `said_for_python` leaves messages as they are."""
    token = _FLAGS.set(True)
    try:
        yield
    finally:
        _FLAGS.reset(token)


@contextmanager
def said_for_python() -> Iterator[None]:
    """Within this context, errors and the notes of Ctrl-C name arguments where they would name flags."""
    try:
        yield
    except RLHFError as error:
        if not _FLAGS.get():
            for one in (error, *error.also):
                _reword(one)
        raise
    except KeyboardInterrupt as error:
        if _FLAGS.get():
            raise
        error.__notes__ = [in_python(note) for note in getattr(error, "__notes__", [])]
        raise


def _reword(error: RLHFError) -> None:
    """Have an error name arguments where it names flags."""
    error.problem, error.args = in_python(error.problem), (in_python(error.problem),)
    error.place = error.place and in_python(error.place)
    error.fix = error.fix and in_python(error.fix)
    error.got = in_python(error.got) if isinstance(error.got, str) else error.got
