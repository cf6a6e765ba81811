"""Print results on stdout, as JSON or as text and tables, safe for any terminal."""

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
    """Print a value as JSON on stdout; control characters, which a terminal would act upon, are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii="utf" not in _encoding().replace("-", ""), default=str)
    if not text.isascii():
        text = "".join(c if c.isascii() or printable(c) == c else json.dumps(c)[1:-1] for c in text)
    print(text)


def print_text(text: str) -> None:
    """Print text on stdout, its line breaks kept and other control characters, which a terminal would act upon, as escapes."""
    print(encodable(printable(text, lines=True)))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Sequence[str] = ()) -> None:
    """Print rows under a header, aligned: wrapped to the terminal's width, or one line per row where stdout is no terminal.

    Args:
        header: the columns' names.
        rows: one text per column; control characters in it are printed as escapes.
        styles: a colour per row, a key of `_CODES`, for terminals with colours.
    """
    cells = [list(header), *([encodable(printable(cell)) for cell in row] for row in rows)]
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


def encodable(text: str) -> str:
    """Return text with escapes for characters that stdout's encoding lacks."""
    return text.encode(_encoding(), "backslashreplace").decode(_encoding())


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return the cells of a row as one line, padded to the columns' widths."""
    padded = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
    return _BETWEEN.join(padded).rstrip()


def _fitted(widths: list[int], room: int) -> list[int]:
    """Return columns' widths that add up to at most `room`: the widest are narrowed, down to 8 characters."""
    most = next((most for most in range(max(widths), 8, -1) if sum(min(width, most) for width in widths) <= room), 8)
    return [min(width, most) for width in widths]


def _folded(text: str, width: int) -> list[str]:
    """Return text in lines of at most `width` terminal columns, broken between words where possible."""
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
    """Return how many columns a text takes on a terminal; wide characters take two."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(one) or one in JOINERS else 2 if east_asian_width(one) in "WF" else 1 for one in text)
