"""Rows from several sources as one sequence, each source as often as its weight says; and the sources that are in memory."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.data.row_source import Cursor, Row, RowSource
from rlhf_core.infra.errors import DataError, RLHFError, describe_error

_BYTES_A_ROW = 1024
"""Assumed size of a row in memory, in bytes."""


class ListRows(RowSource):
    """Rows in a Python list."""

    def __init__(self, rows: Sequence[Any], name: str = "data") -> None:
        self.table, self.name = rows, name

    @property
    def size(self) -> float:
        return len(self.table) * _BYTES_A_ROW

    def rows(self, start: Cursor) -> Iterator[Row]:
        for line, values in enumerate(self._from(start.line), start.line):
            place = f"{self.name}[{line}]"
            if not isinstance(values, Mapping):
                self.refuse(DataError("expected a row as a mapping of columns", place=place, got=type(values).__name__))
                continue
            row = start.row + line - start.line
            yield Row(row, place, values, Cursor(start.source, row + 1, line + 1))

    def _from(self, line: int) -> Iterator[Any]:
        """Yield the rows from number `line` on."""
        return itertools.islice(self.table, line, None)


class TableRows(ListRows):
    """Rows of a map-style `datasets.Dataset`, decoded 1,024 at a time."""

    def _from(self, line: int) -> Iterator[Any]:
        for first in range(line, len(self.table), 1024):
            columns: Any = self.table[first : first + 1024]
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


class IterableRows(RowSource):
    """Rows of a streaming `datasets.IterableDataset`, which itself skips those before a cursor."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.name = stream, name

    @property
    def size(self) -> float:
        return math.inf

    def rows(self, start: Cursor) -> Iterator[Row]:
        stream = self.stream.skip(start.line) if start.line else self.stream
        for line, values in enumerate(stream, start.line):
            row = start.row + line - start.line
            yield Row(row, f"{self.name}[{line}]", values, Cursor(start.source, row + 1, line + 1))


class DataSource:
    """Several sources read one after the other, each row as often as the weight of its source says.

    The fraction of a weight is a share of the rows, which are read once more. Which rows depends on nothing but the number of the
    source and of the line, so it is the same in every epoch and process.

    Args:
        sources: files or tables, at least one.
        weights: one per source; 1.0 each where None.
    """

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.sources)

    @property
    def name(self) -> str:
        """Name of the data as a whole, for messages: the first source's, and how many more there are."""
        more = f" and {len(self.sources) - 1} more" if len(self.sources) > 1 else ""
        return self.sources[0].name + more

    def rows(self, start: Cursor = Cursor()) -> Iterator[Row]:  # noqa: B008
        """Yield the rows from `start` on.

        Raises:
            DataError: a source is malformed or has no rows.
        """
        cursor = start
        for number, source in enumerate(self.sources[start.source :], start.source):
            if number != start.source:
                cursor = Cursor(number, cursor.row)
            empty = cursor.line == 0 and cursor.copy == 0
            rows = source.rows(cursor)
            while (row := next_row(rows, source, cursor)) is not None:
                empty = False
                for copied in self._repeated(row, cursor):
                    yield copied
                    cursor = copied.after
                cursor = row.after._replace(row=cursor.row)
            if empty:
                raise DataError("holds no rows", place=source.name, fix="give data with at least one row")

    def _repeated(self, row: Row, before: Cursor) -> Iterator[Row]:
        """Yield a row as often as its source's weight says. `before` is the cursor before it, or between two of its copies."""
        weight = self.weights[before.source]
        if weight == 1:
            yield Row(before.row, row.place, row.values, row.after._replace(row=before.row + 1))
            return
        key = hashlib.blake2b(f"{before.source} {row.after.line}".encode(), digest_size=8).digest()
        copies = int(weight) + (int.from_bytes(key) / 2**64 < weight % 1)
        for copy in range(before.copy, copies):
            number = before.row + copy - before.copy
            after = before._replace(row=number + 1, copy=copy + 1)
            if copy + 1 == copies:
                after = row.after._replace(row=number + 1)
            yield Row(number, row.place, row.values, after)

    @property
    def size(self) -> float:
        """Approximate size in bytes over all sources, weights counted in; infinite where one isn't known."""
        return sum(source.size * weight for source, weight in zip(self.sources, self.weights, strict=True))

    def state(self) -> list[list[float]]:
        """Return for each source numbers that change when it is written again (see `RowSource.state`)."""
        return [source.state() for source in self.sources]

    def identity(self, *, whole: bool) -> list[dict[str, Any]]:
        """Return each source's content fingerprint (see `RowSource.identity`), with its weight where that isn't 1."""
        return [
            call_reader(source.name, source.identity, whole=whole) | ({"weight": weight} if weight != 1 else {})
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]


def next_row(rows: Iterator[Row], source: RowSource, cursor: Cursor) -> Row | None:
    """Return the next of a source's rows, or None at their end. `cursor` is the place before it, for messages.

    Raises:
        DataError: the row can't be read.
    """
    return call_reader(f"{source.name}, after {cursor.line} rows" if cursor.line else source.name, next, rows, None)


def call_reader(place: str, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call `read`, and raise what a library raises meanwhile as a `DataError` of `place`."""
    try:
        return read(*args, **options)
    except RLHFError:
        raise
    except Exception as error:
        raise DataError("cannot be read", place=place, got=describe_error(error, lines=2)) from error
