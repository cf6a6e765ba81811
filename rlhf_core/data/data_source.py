"""Sources of rows in memory, and several sources read one after the other as one."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.data.row_source import Cursor, Row, RowSource
from rlhf_core.infra.errors import DataError, RLHFError, describe_error

_BYTES_A_ROW = 1024
"""What a row in memory counts for, where sizes are compared."""


class ListRows(RowSource):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Any], name: str = "data") -> None:
        self.table, self.name = rows, name

    @property
    def size(self) -> float:
        return len(self.table) * _BYTES_A_ROW

    def rows(self, start: Cursor) -> Iterator[Row]:
        for line, values in enumerate(self._from(start.line), start.line):
            place = f"{self.name}[{line}]"
            if not isinstance(values, Mapping):
                raise DataError("expected a row as a mapping of columns", place=place, got=type(values).__name__)
            row = start.row + line - start.line
            yield Row(row, place, values, Cursor(start.part, row + 1, line + 1))

    def _from(self, line: int) -> Iterator[Any]:
        return itertools.islice(self.table, line, None)


class TableRows(ListRows):
    """A map-style `datasets.Dataset`, read some rows at a time."""

    def _from(self, line: int) -> Iterator[Any]:
        for first in range(line, len(self.table), 1024):
            columns: Any = self.table[first : first + 1024]
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


class IterableRows(RowSource):
    """A streaming `datasets.IterableDataset`. Rows before a cursor are skipped by the library."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.name = stream, name

    @property
    def size(self) -> float:
        return math.inf

    def rows(self, start: Cursor) -> Iterator[Row]:
        stream = self.stream.skip(start.line) if start.line else self.stream
        for line, values in enumerate(stream, start.line):
            row = start.row + line - start.line
            yield Row(row, f"{self.name}[{line}]", values, Cursor(start.part, row + 1, line + 1))


class DataSource:
    """The parts of some data, read one after the other, each row as often as its part's weight says.

    A weight's fraction takes some of the rows once more: which, is a function of the part and the line alone.
    """

    def __init__(self, parts: Sequence[RowSource], weights: Sequence[float] | None = None) -> None:
        self.parts = list(parts)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.parts)

    @property
    def name(self) -> str:
        """What a message calls the data as a whole."""
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return self.parts[0].name + more

    def rows(self, start: Cursor = Cursor()) -> Iterator[Row]:  # noqa: B008
        """Yield the rows from `start` on.

        Raises:
            DataError: a part is malformed, or holds no row at all.
        """
        cursor = start
        for number, part in enumerate(self.parts[start.part :], start.part):
            if number != start.part:
                cursor = Cursor(number, cursor.row)
            empty = cursor.line == 0 and cursor.copy == 0
            rows = part.rows(cursor)
            while (row := next_row(rows, part, cursor)) is not None:
                empty = False
                for copied in self._repeated(row, cursor):
                    yield copied
                    cursor = copied.after
                cursor = row.after._replace(row=cursor.row)
            if empty:
                raise DataError("holds no rows", place=part.name, fix="give data with at least one row")

    def _repeated(self, row: Row, before: Cursor) -> Iterator[Row]:
        """Yield a row as often as its part's weight says; `before` is the place before it, or between its copies."""
        weight = self.weights[before.part]
        if weight == 1:
            yield Row(before.row, row.place, row.values, row.after._replace(row=before.row + 1))
            return
        key = hashlib.blake2b(f"{before.part} {row.after.line}".encode(), digest_size=8).digest()
        copies = int(weight) + (int.from_bytes(key) / 2**64 < weight % 1)
        for copy in range(before.copy, copies):
            number = before.row + copy - before.copy
            after = before._replace(row=number + 1, copy=copy + 1)
            if copy + 1 == copies:
                after = row.after._replace(row=number + 1)
            yield Row(number, row.place, row.values, after)

    @property
    def size(self) -> float:
        """About how many bytes there are, over all parts; infinite where nothing tells it."""
        return sum(part.size * weight for part, weight in zip(self.parts, self.weights, strict=True))

    def state(self) -> list[list[float]]:
        """Return what changes when a file is written again, without reading it."""
        return [part.state() for part in self.parts]

    def identity(self, *, whole: bool) -> list[dict[str, Any]]:
        """Return each part's name and hash (see `Part.identity`), and its weight where that isn't 1."""
        return [
            reading(part.name, part.identity, whole=whole) | ({"weight": weight} if weight != 1 else {})
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]


def next_row(rows: Iterator[Row], part: RowSource, cursor: Cursor) -> Row | None:
    return reading(f"{part.name}, after {cursor.line} rows" if cursor.line else part.name, next, rows, None)


def reading(place: str, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what `read` does. Whatever a library raises while it reads is a fault of the data."""
    try:
        return read(*args, **options)
    except RLHFError:
        raise
    except Exception as error:
        raise DataError("cannot be read", place=place, got=describe_error(error, lines=2)) from error
