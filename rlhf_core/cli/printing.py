"""Results on stdout: as JSON for programs, as tables for people."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from itertools import zip_longest
from shutil import get_terminal_size
from typing import Any

from rlhf_core.infra.errors import JOINERS, printable

_BETWEEN = "  "
_CODES = {"": "", "bold": "1", "dim": "2", "red": "31", "yellow": "33"}


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout. Whatever a terminal would act upon is escaped, as JSON has it."""
    text = json.dumps(value, indent=2, ensure_ascii="utf" not in _encoding().replace("-", ""), default=str)
    if not text.isascii():
        text = "".join(c if c.isascii() or printable(c) == c else json.dumps(c)[1:-1] for c in text)
    print(text)


def print_text(text: str) -> None:
    """Print text that others wrote, its lines kept: what a terminal would act upon is shown instead."""
    print(_encodable(printable(text, lines=True)))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Sequence[str] = ()) -> None:
    """Print rows under a header, aligned: wrapped to the terminal, or a line a row, never cut, where there is none.

    `styles` gives each row's colour, for terminals that have any. A cell is one line, and nothing in it is acted upon.
    """
    cells = [list(header), *([_encodable(printable(cell)) for cell in row] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    if not sys.stdout.isatty():
        for row in cells:
            print(_aligned(row, widths))
        return
    widths = _fitted(widths, get_terminal_size().columns - len(_BETWEEN) * (len(widths) - 1))
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    for row, style in zip(cells, ("bold", *(styles or [""] * len(rows))), strict=True):
        code = "" if plain else _CODES[style]
        for line in zip_longest(*map(_folded, row, widths), fillvalue=""):
            text = _aligned(line, widths)
            print(f"\x1b[{code}m{text}\x1b[0m" if code else text)


def print_warning(text: str) -> None:
    """Print one line on stderr."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def _encoding() -> str:
    return (getattr(sys.stdout, "encoding", None) or "utf-8").casefold()


def _encodable(text: str) -> str:
    """Return text with escapes for what stdout has no bytes for."""
    return text.encode(_encoding(), "backslashreplace").decode(_encoding())


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
    return _BETWEEN.join(padded).rstrip()


def _fitted(widths: list[int], room: int) -> list[int]:
    """Return widths that fit together: the widest give way, down to a few characters."""
    most = next((most for most in range(max(widths), 8, -1) if sum(min(width, most) for width in widths) <= room), 8)
    return [min(width, most) for width in widths]


def _folded(text: str, width: int) -> list[str]:
    """Return text in lines of at most `width` columns, broken between words where it can be."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and _width(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while _width(line) > width:
            cut = next(count for count in range(len(line), 0, -1) if _width(line[:count]) <= width or count == 1)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line]


def _width(text: str) -> int:
    """Return how many columns of a terminal text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(one) or one in JOINERS else 2 if east_asian_width(one) in "WF" else 1 for one in text)
