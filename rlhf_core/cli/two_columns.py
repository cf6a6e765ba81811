"""Two texts that grow, beside each other on a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import zip_longest
from shutil import get_terminal_size

from rlhf_core.cli.printing import encodable, folded, padded, styled, text_width
from rlhf_core.infra.errors import printable


class TwoColumns:
    """Writes two texts that grow to a terminal, each into its column; what has scrolled off the screen stays as it is.

    Between two calls the cursor is at the beginning of the line below the last row.

    Args:
        names: of what writes the two texts; they stand above the columns behind A and B, long ones without their beginning.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._between = encodable(" │ ")
        self._width = (text_width() - 1 - len(self._between)) // 2
        """Terminal columns of each text."""
        self._rows: list[list[str]] = []
        """The two lines of each row, as they are on the screen."""
        self._counts = [0, 0]
        """Lines of each text."""
        titles = [f"{label}: {self._end(encodable(printable(name)))}" for label, name in zip("AB", names, strict=True)]
        print(styled(self._row(titles), "bold"), flush=True)

    def show(self, column: int, text: str) -> None:
        """Write what has changed of a text; blank lines at its beginning are left out."""
        text = re.sub(r"\A(?:[^\S\n]*\n)+", "", printable(text, lines=True).expandtabs(4))
        lines = [part for line in text.split("\n") for part in folded(encodable(line), self._width)] if text else []
        for number in range(max(len(lines), self._counts[column])):
            if number == len(self._rows):
                self._rows.append(["", ""])
                sys.stdout.write("\r\x1b[K\n")
            line = lines[number] if number < len(lines) else ""
            if line != self._rows[number][column]:
                self._rows[number][column] = line
                self._write(number)
        self._counts[column] = len(lines)
        sys.stdout.flush()

    def may_grow(self, column: int) -> bool:
        """Tell whether a text is so little ahead of the other one that the other's next line is still on the screen."""
        return self._counts[column] - self._counts[1 - column] < get_terminal_size().lines - 2

    def end(self, notes: Sequence[str]) -> None:
        """Write a note below each text."""
        sys.stdout.write("\r\x1b[K")
        left, right = (folded(encodable(note), self._width) for note in notes)
        for lines in zip_longest(left, right, fillvalue=""):
            print(styled(self._row(lines), "dim"), flush=True)

    def _write(self, number: int) -> None:
        up = len(self._rows) - number
        if up < get_terminal_size().lines:
            # A key that is typed meanwhile, such as Ctrl-C, may have moved the cursor to the right.
            sys.stdout.write(f"\r\x1b[{up}A{self._row(self._rows[number])}\x1b[K\r\x1b[{up}B")

    def _row(self, lines: Sequence[str]) -> str:
        left, right = lines
        return f"{padded(left, self._width)}{self._between}{right}"

    def _end(self, name: str) -> str:
        """Return a name, or its end where it is too wide for its column behind `A: `."""
        room = self._width - len("A: ")
        return name if len(folded(name, room)) == 1 else encodable("…") + folded(name[::-1], room - 1)[0][::-1]
