"""Results on stdout: as JSON for programs, as tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rlhf_core.errors import printable


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
    rows = [[_encodable(printable(cell)) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        return _print_plain([header, *rows])
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style=styles[number] if styles else "")
    return Console().print(table)


def print_warning(text: str) -> None:
    """Print one line on stderr."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def _encoding() -> str:
    return (getattr(sys.stdout, "encoding", None) or "utf-8").casefold()


def _encodable(text: str) -> str:
    """Return text with escapes for what stdout has no bytes for."""
    return text.encode(_encoding(), "backslashreplace").decode(_encoding())


def _print_plain(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
