"""Files of rows in tables: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from rlhf_core.data.row_source import COMPRESSION, Cursor, Row, RowFile, TextFile
from rlhf_core.infra.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

_LONGEST_FIELD = 1 << 28


class Delimited(TextFile):
    """A CSV or TSV file with a header. Every value is text; in quotes it may hold delimiters and line ends."""

    @property
    def delimiter(self) -> str:
        """The character between two columns: a tab where the name ends in `.tsv`, else a comma."""
        suffixes = [suffix for suffix in self.path.suffixes if suffix not in COMPRESSION]
        return "\t" if suffixes[-1:] == [".tsv"] else ","

    def rows(self, start: Cursor) -> Iterator[Row]:
        # The library's own limit is 128 KiB a field, which a long answer passes.
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
        records = self._records(Cursor())
        header, after = next(((fields, after) for _, fields, after in records), ([], Cursor()))
        records.close()
        header = [name.strip() for name in header]
        if header:
            self._check_header(header)
        row = start.row
        for line, fields, end in self._records(start if start.offset else after):
            place = f"{self.name}:{line}"
            if len(fields) != len(header):
                self.refuse(
                    DataError(
                        f"has {len(fields)} values for {len(header)} columns",
                        place=place,
                        fix=f"put values that hold `{self.delimiter}` or a line end in quotes".replace("\t", "a tab"),
                    )
                )
                continue
            # A column without a name is the index that pandas writes.
            values = {name: value for name, value in zip(header, fields, strict=True) if name}
            yield Row(row, place, values, Cursor(start.source, row + 1, end.line, end.offset))
            row += 1

    def _records(self, start: Cursor) -> Generator[tuple[int, list[str], Cursor], None, None]:
        """Yield the line on which each record begins, its values, and where it ends."""
        line, offset = start.line, start.offset

        def texts() -> Iterator[str]:
            nonlocal line, offset
            for raw, ended in self.lines(offset):
                line, begin, offset = line + 1, offset, offset + len(raw) + ended
                yield self.decode(raw, f"{self.name}:{line}", begin) + "\n" * ended

        reader = csv.reader(texts(), delimiter=self.delimiter, strict=True)
        while True:
            first = line + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if "new-line character" in str(error):
                    raise DataError(
                        "a carriage return without a line feed, outside quotes",
                        place=f"{self.name}:{first}",
                        fix="write line ends as LF or CRLF, and put values that hold one in quotes",
                    ) from None
                raise DataError(
                    "not a valid CSV record",
                    place=f"{self.name}:{first}",
                    got=str(error),
                    fix="close and double the quotes",
                ) from None
            if fields is None:
                return
            if fields:
                yield first, fields, Cursor(0, 0, line, offset)

    def _check_header(self, header: list[str]) -> None:
        """Raise `DataError` where names are missing or repeated, or the delimiter seems to be another one."""
        twice = next((name for name in header if header.count(name) > 1), None)
        place = f"{self.name}:1"
        if twice == "":
            raise DataError(
                f"{header.count('')} columns have no name",
                place=place,
                fix="name them, or leave them out (pandas writes its index so without `index=False`)",
            )
        if twice is not None:
            raise DataError(f"column {twice!r} appears twice", place=place, fix="name each column once")
        other = next((mark for mark in (";", "\t", "|", ",") if mark != self.delimiter and mark in header[0]), None)
        if len(header) == 1 and other is not None:
            raise DataError(
                f"the columns aren't separated by {self.delimiter!r}",
                place=place,
                got=f"{other!r} between names",
                fix="name the file .tsv" if other == "\t" else f"write it with {self.delimiter!r} between columns",
            )


class ParquetRows(RowFile):
    """A Parquet file, read one row group at a time."""

    def rows(self, start: Cursor) -> Iterator[Row]:
        import pyarrow.parquet as pq

        row, line = start.row, 0
        try:
            with pq.ParquetFile(self.name) as file:
                names = file.schema_arrow.names
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise DataError(f"column {twice!r} appears twice", place=self.name, fix="name each column once")
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    if line + size <= start.line:
                        line += size
                        continue
                    for batch in file.iter_batches(1024, row_groups=[group]):
                        skip = max(0, min(start.line - line, batch.num_rows))
                        line += skip
                        for values in self._values(batch.slice(skip), line):
                            line += 1
                            yield Row(row, f"{self.name}:row {line}", values, Cursor(start.source, row + 1, line))
                            row += 1
        except DataError:
            raise
        except Exception as error:  # Damaged files make the library raise errors of many kinds.
            raise DataError(
                "not a readable Parquet file",
                place=f"{self.name}:row {line + 1}" if line else self.name,
                got=first_line(error),
            ) from None

    def _values(self, batch: pa.RecordBatch, before: int) -> list[dict[str, Any]]:
        """Return a batch's rows. `before` counts the rows before it, for messages.

        Raises:
            DataError: a value can't be represented in Python, such as a date in the year 20,000.
        """
        try:
            return batch.to_pylist()
        except Exception:
            for number in range(batch.num_rows):
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    try:
                        column[number].as_py()
                    except Exception as error:
                        raise DataError(
                            f"`{name}` can't be read",
                            place=f"{self.name}:row {before + number + 1}",
                            got=f"{column.type}: {first_line(error)}",
                            fix="write it as text, or leave the column out",
                        ) from None
            raise
