"""Flags in the messages of what both the command line and Python call, as Python writes them: `--resume` is `resume=True`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_core.infra.errors import RLHFError

_COMMAND = re.compile(r"(`rlhf [^`]*`)")
_ALLOWED = re.compile(r"(?<![\w/-])--allow-change ([\w.]+(?:,[\w.]+)*)(?=`)")
_SWITCH = re.compile(r"(?<![\w/-])--(resume|overwrite)\b")
_OPTION = re.compile(r"(?<![\w/-])--([a-z][\w.-]*)")


def in_python(text: str) -> str:
    """Return a message with flags as arguments of Python; commands that it tells to run (`rlhf …`) stay as they are."""
    return "".join(part if part.startswith("`rlhf ") else _arguments(part) for part in _COMMAND.split(text))


def _arguments(text: str) -> str:
    text = _ALLOWED.sub(lambda found: f"allow_change={found[1].split(',')!r}".replace("'", '"'), text)
    text = _SWITCH.sub(r"\1=True", text)
    return _OPTION.sub(lambda found: found[1].replace("-", "_"), text)


@contextmanager
def said_for_python() -> Iterator[None]:
    """Within this context, errors and the notes of Ctrl-C name arguments where they would name flags."""
    try:
        yield
    except RLHFError as error:
        error.problem, error.args = in_python(error.problem), (in_python(error.problem),)
        error.place = error.place and in_python(error.place)
        error.fix = error.fix and in_python(error.fix)
        error.got = in_python(error.got) if isinstance(error.got, str) else error.got
        raise
    except KeyboardInterrupt as error:
        error.__notes__ = [in_python(note) for note in getattr(error, "__notes__", [])]
        raise
