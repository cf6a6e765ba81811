"""Files of rows: JSONL (plain, .gz, .zst) and Parquet, read from any cursor on. What is wrong with one is a `DataError`."""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.errors import DataError

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_LINES, *(end + pack for end in _LINES for pack in _COMPRESSION), ".parquet")
"""File names that are read, by their end."""

_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 28


class Cursor(NamedTuple):
    """A place between two rows from which reading goes on. As a list it is JSON."""

    part: int = 0
    """Which of the source's parts (files)."""
    row: int = 0
    """Rows before it, over all parts."""
    line: int = 0
    """Lines, or rows, before it in its part."""
    offset: int = 0
    """Uncompressed bytes before it in its part, where that is known."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the data."""

    index: int
    """Number of the row in the whole data, from 0."""
    place: str
    """What a message calls it: `file:line`."""
    values: Mapping[str, Any]
    after: Cursor


class Part(ABC):
    """One file or table of a source."""

    name: str

    @abstractmethod
    def rows(self, start: Cursor) -> Iterator[Row]:
        """Yield the rows from `start` on, which stands in this part."""

    def identity(self, *, whole: bool) -> dict[str, Any]:
        """Return what tells this part from another: name, bytes and a hash. Without `whole` only its ends are hashed."""
        head = list(itertools.islice((row.values for row in self.rows(Cursor())), None if whole else 16))
        text = json.dumps(head, default=repr, sort_keys=True)
        return {"name": self.name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


class _File(Part):
    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def identity(self, *, whole: bool) -> dict[str, Any]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            if whole:
                return {"name": self.name, "bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            ends = hashlib.sha256(file.read(_CHUNK))
            file.seek(max(0, size - _CHUNK))
            ends.update(file.read(_CHUNK))
        return {"name": self.name, "bytes": size, "sha256_of_ends": ends.hexdigest()}


class JsonLines(_File):
    """One JSON object a line, UTF-8. Blank lines, CRLF and a byte order mark are taken as they come."""

    def rows(self, start: Cursor) -> Iterator[Row]:
        row, line, offset = start.row, start.line, start.offset
        for raw, ended in self._lines(offset):
            line, begin, offset = line + 1, offset, offset + len(raw) + ended
            text = self._decode(raw, line, begin)
            if not text.strip():
                continue
            place = f"{self.name}:{line}"
            values = self._parse(text, place, ended=ended, first=begin == 0)
            yield Row(row, place, values, Cursor(start.part, row + 1, line, offset))
            row += 1

    def _lines(self, offset: int) -> Iterator[tuple[bytes, bool]]:
        """Yield each line from a byte offset on without its newline, and whether it had one."""
        import pyarrow as pa

        compression = _COMPRESSION.get(self.path.suffix)
        try:
            if compression is None:
                with self.path.open("rb") as file:
                    file.seek(offset)
                    yield from self._split(file.read)
                return
            with pa.input_stream(self.name, compression=compression) as stream:
                while offset > 0 and (skipped := len(stream.read(min(offset, _CHUNK)))):
                    offset -= skipped
                yield from self._split(stream.read)
        except OSError as error:
            problem, fix = "cannot be read", None
            if compression and not isinstance(error, FileNotFoundError | PermissionError):
                problem, fix = f"the {compression} stream is damaged or cut off", "copy or compress the file again"
            raise DataError(problem, place=self.name, got=error.strerror or str(error), fix=fix) from None

    def _split(self, read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bool]]:
        rest = b""
        while chunk := read(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else [rest + chunk]
            for line in lines:
                yield line, True
            if len(rest) > _LONGEST_LINE:
                raise DataError(f"a line is longer than {_LONGEST_LINE >> 20} MiB", place=self.name)
        if rest:
            yield rest, False

    def _decode(self, raw: bytes, line: int, begin: int) -> str:
        try:
            return raw.decode("utf-8-sig" if begin == 0 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                "not UTF-8",
                place=f"{self.name}:{line}",
                got=f"byte 0x{raw[error.start]:02x} at offset {begin + error.start}",
                fix="save the file as UTF-8",
            ) from None

    def _parse(self, text: str, place: str, *, ended: bool, first: bool) -> dict[str, Any]:
        try:
            values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except _DuplicateKey as error:
            raise DataError(f"key `{error}` stands twice in one object", place=place, fix="keep one of them") from None
        except _NotFinite as error:
            raise DataError(
                "a number isn't finite", place=place, got=str(error), fix="remove or repair the row"
            ) from None
        except json.JSONDecodeError as error:
            raise self._malformed(text, error, place, ended=ended, first=first) from None
        except RecursionError:
            raise DataError("nested too deeply", place=place) from None
        if isinstance(values, dict):
            return values
        if isinstance(values, list):
            raise self._array(place)
        raise DataError("expected one JSON object a line", place=place, got=type(values).__name__)

    def _malformed(self, text: str, error: json.JSONDecodeError, place: str, *, ended: bool, first: bool) -> DataError:
        if first and text.lstrip().startswith("["):
            return self._array(place)
        place = f"{place}:{error.colno}"
        if not ended and (not text.rstrip().endswith("}") or error.pos >= len(text.rstrip())):
            return DataError("the last line is cut off", place=place, got=error.msg, fix="write the file again")
        hint = "write each object on one line" if text.strip() in ("{", "[") else "repair or delete the line"
        return DataError("not valid JSON", place=place, got=error.msg, fix=hint)

    def _array(self, place: str) -> DataError:
        return DataError(
            "holds a JSON array, expected one JSON object a line",
            place=place,
            fix=f"`jq -c '.[]' {self.path.name} > rows.jsonl` writes one row a line",
        )


class _DuplicateKey(Exception):
    pass


class _NotFinite(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return values


def _no_constant(text: str) -> float:
    raise _NotFinite(text)


class ParquetRows(_File):
    """A Parquet file, read one row group at a time."""

    def rows(self, start: Cursor) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.name) as file:
                row, line = start.row, 0
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    if line + size <= start.line:
                        line += size
                        continue
                    for batch in file.iter_batches(1024, row_groups=[group]):
                        skip = max(0, min(start.line - line, batch.num_rows))
                        line += skip
                        for values in batch.slice(skip).to_pylist():
                            line += 1
                            yield Row(row, f"{self.name}:row {line}", values, Cursor(start.part, row + 1, line))
                            row += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError("not a readable Parquet file", place=self.name, got=str(error).splitlines()[0]) from None
