"""Rows from several sources as one sequence, of each source as many as its part says; and the sources that are in memory."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_core.data.row_source import Cursor, Row, RowEntry, RowSource
from rlhf_core.infra.errors import DataError, RLHFError, describe_error

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class SourcePart:
    """The sources that one entry of `data` names, and how many of their rows are taken."""

    sources: Sequence[RowSource]
    """Files or tables, at least one."""
    weight: float = 1.0
    """How often each row comes. The fraction of a weight is a share of the rows, which come once more."""
    rows: int | None = None
    """How many rows are taken: the first ones, and where there are fewer, those again from the beginning; None takes all."""
    entry: RowEntry | None = None
    """What its rows carry with them; None where it is all of the data, and they are read as the data as a whole are."""
    once: bool = False
    """Whether none comes again: where there are fewer than `rows`, these are all."""

    @property
    def name(self) -> str:
        """Its name, for messages."""
        return self.sources[0].name if self.entry is None else f"{self.sources[0].name} (`{self.entry.name}`)"


class DataSource:
    """Several sources read one after the other, each row as often as its part says.

    Which rows come once more depends on nothing but the number of the source and of the line, so it is the same in every epoch
    and process.

    Args:
        parts: at least one.
        groups: the share of each group of parts from which rows are drawn by probability, and the numbers of its parts, which
            follow those of the group before it; none where all rows are read one after the other.
    """

    def __init__(self, parts: Sequence[SourcePart], groups: Sequence[tuple[float, Sequence[int]]] = ()) -> None:
        self.parts, self.groups = list(parts), list(groups)
        self.sources = [source for part in self.parts for source in part.sources]
        self._firsts = list(itertools.accumulate((len(part.sources) for part in self.parts), initial=0))
        self._group_of = [0] * len(self.parts)
        self._fewer: list[SourcePart] = []
        for group, (_, numbers) in enumerate(self.groups):
            for number in numbers:
                self._group_of[number] = group

    @property
    def name(self) -> str:
        """Name of the data as a whole, for messages: the first source's, and how many more there are."""
        more = f" and {len(self.sources) - 1} more" if len(self.sources) > 1 else ""
        return self.sources[0].name + more

    @property
    def shares(self) -> list[float]:
        """Share of each group that rows are drawn from; empty where all rows are read one after the other."""
        return [share for share, _ in self.groups]

    def rows(self, start: Cursor = Cursor(), *, parts: Collection[int] | None = None) -> Iterator[Row]:  # noqa: B008
        """Yield the rows from `start` on. Rows of different groups have different numbers, also where only some parts are read.

        Args:
            parts: numbers of the parts that are read, all of one group; None reads all.

        Raises:
            DataError: a source is malformed or has no rows.
        """
        cursor, before = start, None
        for number, part in enumerate(self.parts):
            first, end = self._firsts[number : number + 2]
            if cursor.source >= end or (parts is not None and number not in parts):
                continue
            group = self._group_of[number]
            if cursor.source < first:
                cursor = Cursor(first, cursor.row if before in (None, group) else 0)
            for row in self._rows_of(part, cursor, first, group):
                yield row
                cursor = row.after
            cursor, before = cursor._replace(source=max(cursor.source, first)), group

    def _rows_of(self, part: SourcePart, start: Cursor, first: int, group: int) -> Iterator[Row]:
        """Yield a part's rows from `start` on. `first` is the number of its first source."""
        cursor, groups = start, max(1, len(self.groups))
        plain = groups == 1 and part.entry is None and part.rows is None  # most data, and copying a row takes time
        while part.rows is None or cursor.taken < part.rows:
            for number in range(cursor.source, first + len(part.sources)):
                if number != cursor.source:
                    cursor = Cursor(number, cursor.row, taken=cursor.taken)
                for row in self._source_rows(part, part.sources[number - first], cursor):
                    cursor = row.after if part.rows is None else row.after._replace(taken=cursor.taken + 1)
                    if plain:
                        yield row
                        continue
                    yield replace(row, index=row.index * groups + group, after=cursor, entry=part.entry)
                    if cursor.taken == part.rows:
                        return
            if part.rows is None:
                return
            if part.once:
                self._say_fewer(part, cursor.taken)
                return
            cursor = Cursor(first, cursor.row, taken=cursor.taken)

    def _say_fewer(self, part: SourcePart, found: int) -> None:
        """Warn, once, that a part has fewer rows than were asked for."""
        if part not in self._fewer:
            self._fewer.append(part)
            log.warning("%s: it has %d rows, fewer than `rows: %d`; each is scored once", part.name, found, part.rows)

    def _source_rows(self, part: SourcePart, source: RowSource, start: Cursor) -> Iterator[Row]:
        """Yield the rows of one source from `start` on, each as often as the part's weight says."""
        cursor = start
        empty = cursor.line == 0 and cursor.copy == 0
        rows = source.rows(cursor)
        while (row := next_row(rows, source, cursor)) is not None:
            empty = False
            for copied in _repeated(row, cursor, part.weight):
                yield copied
                cursor = copied.after
            cursor = row.after._replace(row=cursor.row)
        if empty:
            raise DataError("holds no rows", place=source.name, fix="give data with at least one row")

    @property
    def size(self) -> float:
        """Approximate size in bytes over all sources, weights counted in; infinite where one isn't known."""
        return sum(_size(part) for part in self.parts)

    def state(self) -> list[list[float]]:
        """Return for each source numbers that change when it is written again (see `RowSource.state`)."""
        return [source.state() for source in self.sources]

    def identity(self, *, whole: bool) -> list[dict[str, Any]]:
        """Return each source's content fingerprint (see `RowSource.identity`), with what decides which rows it gives and how they
        are read."""
        found = []
        for part in self.parts:
            entry = part.entry
            said: dict[str, Any] = {
                "entry": entry.name if entry is not None else None,
                "weight": part.weight if part.weight != 1 else None,
                "rows": part.rows,
                "once": part.once and part.rows is not None,
                "columns": dict(entry.columns) if entry is not None else None,
                "format": entry.format if entry is not None else None,
            }
            kept = {name: value for name, value in said.items() if value}
            found += [call_reader(source.name, source.identity, whole=whole) | kept for source in part.sources]
        return found


def _size(part: SourcePart) -> float:
    """Return the approximate size of a part in bytes, of which it may take fewer."""
    size = sum(source.size for source in part.sources) * part.weight
    return size if part.rows is None else max(size, part.rows * _BYTES_A_ROW)


def _repeated(row: Row, before: Cursor, weight: float) -> Iterator[Row]:
    """Yield a row as often as a weight says. `before` is the cursor before it, or between two of its copies."""
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
