"""Results on stdout: as JSON for programs, as tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

_PLAIN_WIDTH = 10_000  # what is piped is never wrapped or cut


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Sequence[str] = ()) -> None:
    """Print rows under a header, aligned; wrapped to the terminal, or a line a row where there is none.

    `styles` gives each row's colour, for terminals that have any.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold", no_wrap=not sys.stdout.isatty())
    for number, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style=styles[number] if styles else "")
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())
