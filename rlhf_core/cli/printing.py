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
_CODES = {"": "", "bold": "1", "dim": "2", "red": "31", "yellow": "33", "green": "32"}


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
        for line in zip_longest(*map(folded, row, widths), fillvalue=""):
            text = _aligned(line, widths)
            print(f"\x1b[{code}m{text}\x1b[0m" if code else text)


def print_json_line(value: Any) -> None:
    """Print a value as one line of JSON on stdout, control characters escaped, and flush it."""
    text = json.dumps(value, ensure_ascii="utf" not in _encoding().replace("-", ""), default=str)
    print("".join(c if c.isascii() or printable(c) == c else json.dumps(c)[1:-1] for c in text), flush=True)


def print_heading(text: str) -> None:
    """Print one line in bold, clipped to the terminal's width."""
    line = encodable(printable(text))
    width = text_width()
    if _width(line) > width:
        line = _folded_hard(line, width - 1)[0] + "…"
    print(styled(line, "bold"))


def print_note(text: str) -> None:
    """Print text that is less important than what it stands under, broken to the terminal's width, and flush it."""
    for line in folded(encodable(printable(text)), text_width()):
        print(styled(line, "dim"), flush=True)


def print_wrapped(text: str, *, width: int | None = None) -> None:
    """Print text with its line breaks; longer lines are broken between words to the terminal's width."""
    for line in printable(text, lines=True).expandtabs(4).split("\n"):
        for part in folded(encodable(line), width or text_width()):
            print(part)


def print_hanging(before: str, text: str) -> None:
    """Print text behind what stands before it; the lines that it is broken into begin below the text's first word."""
    width = text_width() if sys.stdout.isatty() else 80
    for number, line in enumerate(folded(encodable(printable(text)), max(width - len(before), 20))):
        print(f"{' ' * len(before) if number else before}{line}")


def print_rule(title: str) -> None:
    """Print a line across the terminal with a title in it."""
    text = encodable(f"── {printable(title)} ")
    width = text_width()
    if width > _width(text) and sys.stdout.isatty():
        text += encodable("─" * (width - _width(text)))
    print(styled(text.rstrip() if not sys.stdout.isatty() else text, "bold"))


class WrappedWriter:
    """Writes a text that grows to stdout, broken between words to the terminal's width.

    A word is written once it is whole, so that it can be put onto the next line; one that is wider than a line is broken.
    """

    def __init__(self) -> None:
        self._text = ""
        """What was shown so far, the word included that isn't written yet."""
        self._word = ""
        self._column = 0
        self._began = False
        """Whether anything but blanks was shown."""

    def show(self, text: str) -> None:
        """Write what a text has become longer by since the last call; blank lines at its beginning are left out."""
        if not text.startswith(self._text):
            # What was written can't be taken back: the text begins again on a new line.
            self.end()
            self._text = ""
        new, self._text = text[len(self._text) :], text
        for character in encodable(printable(new, lines=True)):
            if character in " \t\n":
                self._write_word()
                if character != "\n":
                    self._blank(character)
                elif self._began:
                    self._newline()
            else:
                self._word += character
                self._began = True
        sys.stdout.flush()

    def end(self) -> None:
        """Write the last word, and end the line."""
        self._write_word()
        print(flush=True)
        self._column = 0

    def _blank(self, character: str) -> None:
        text = "    " if character == "\t" else character
        if self._column + len(text) <= text_width():
            sys.stdout.write(text)
            self._column += len(text)

    def _newline(self) -> None:
        sys.stdout.write("\n")
        self._column = 0

    def _write_word(self) -> None:
        width = text_width()
        word, self._word = self._word, ""
        if self._column and self._column + _width(word) > width:
            self._newline()
        for number, part in enumerate(_folded_hard(word, width) if word else []):
            if number:
                self._newline()
            sys.stdout.write(part)
            self._column += _width(part)


def text_width() -> int:
    """Return how many columns the terminal has; a large number where stdout is none, so that nothing is broken or clipped."""
    return get_terminal_size().columns if sys.stdout.isatty() else 1 << 20


def styled(text: str, style: str) -> str:
    """Return text in a style of `_CODES`, where stdout is a terminal that shows styles."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def _folded_hard(text: str, width: int) -> list[str]:
    """Return text in lines of at most `width` terminal columns, broken anywhere."""
    lines = []
    while _width(text) > width:
        cut = next(count for count in range(len(text), 0, -1) if _width(text[:count]) <= width or count == 1)
        lines.append(text[:cut])
        text = text[cut:]
    return [*lines, text]


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
    return _BETWEEN.join(map(padded, row, widths)).rstrip()


def padded(text: str, width: int) -> str:
    """Return text with blanks behind it, so that it takes `width` columns of a terminal."""
    return text + " " * (width - _width(text))


def _fitted(widths: list[int], room: int) -> list[int]:
    """Return columns' widths that add up to at most `room`: the widest are narrowed, down to 8 characters."""
    most = next((most for most in range(max(widths), 8, -1) if sum(min(width, most) for width in widths) <= room), 8)
    return [min(width, most) for width in widths]


def folded(text: str, width: int) -> list[str]:
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
