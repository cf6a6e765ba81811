"""A source of rows (one file or one table), which can be read from any cursor on; errors in it are `DataError`s."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.data.row_values import check_sound, written_whole
from rlhf_core.infra.errors import DataError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}

_MAGIC = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet", b"PK\x03\x04": "zip", b"BZh": "bzip2",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
"""A file's first bytes → what kind of file it is."""
_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 28


class Cursor(NamedTuple):
    """A place between two rows of some sources, from which reading can continue. It is saved as a list of JSON numbers."""

    source: int = 0
    """Which of the sources, from 0."""
    row: int = 0
    """Rows before it, over all sources."""
    line: int = 0
    """Lines (of a table: rows) before it in its source."""
    offset: int = 0
    """Uncompressed bytes (in a JSON array: characters) before it in its source; 0 where unknown."""
    copy: int = 0
    """How often the next row was already read, where rows are repeated by a weight."""
    taken: int = 0
    """Rows already taken of its entry of `data`, where that says how many."""


@dataclass(frozen=True, slots=True)
class RowEntry:
    """An entry of `data`, as its rows are read and counted."""

    name: str
    """Its name in reports; no other entry has it."""
    columns: tuple[tuple[str, str], ...] = ()
    """Columns of its own: field of the record type, the data's column."""
    format: str | None = None
    """Shape of its rows, where that is its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is in the data, before it is checked."""

    index: int
    """Number of the row in the whole data, from 0."""
    place: str
    """Where it is, for messages: `file:line`."""
    values: Mapping[str, Any]
    """Column → value."""
    after: Cursor
    """The cursor after it."""
    entry: RowEntry | None = None
    """The entry of `data` that it is of, where there are several."""


class RowSource(ABC):
    """One file or table."""

    name: str
    """Its path or name, for messages."""
    refused: Callable[[DataError], None] | None = None
    """Gets the error of each row that can't be read, where those after it can be; None has the error raised."""

    def refuse(self, error: DataError) -> None:
        """Raise the error of one row, or hand it to `refused`, so that the next row is read."""
        if self.refused is None:
            raise error
        self.refused(error)

    @property
    @abstractmethod
    def size(self) -> float:
        """Approximate size in bytes; infinite where it isn't known without reading."""

    def state(self) -> list[float]:
        """Return numbers that change when the contents are written again (size, time of change), without reading them."""
        return []

    @abstractmethod
    def rows(self, start: Cursor) -> Iterator[Row]:
        """Yield the rows from `start` on, a cursor of this source."""

    def identity(self, *, whole: bool) -> dict[str, Any]:
        """Return the source's content fingerprint as JSON values: its name, its size where known, and a hash.

        The hash is `sha256` of the whole contents; `sha256_of_ends` without `whole`, for sources too large to read first; or
        `sha256_of_repr` where rows hold objects of which `repr` may not show everything, so that equal hashes prove nothing.
        """
        digest, exact = hashlib.sha256(), True
        for row in itertools.islice(self.rows(Cursor()), None if whole else 16):
            check_sound(row.values, row.place)
            digest.update(f"{row.values!r}\n".encode())
            exact = exact and written_whole(row.values)
        kind = "sha256" if exact and whole else "sha256_of_ends" if exact else "sha256_of_repr"
        return {"name": self.name, kind: digest.hexdigest()}


class RowFile(RowSource):
    """A file of rows on disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    @property
    def size(self) -> float:
        try:
            return self.path.stat().st_size
        except OSError:  # Reading it raises a better error.
            return 0

    def state(self) -> list[float]:
        try:
            found = self.path.stat()
        except OSError:
            return []
        return [found.st_size, found.st_mtime_ns, found.st_ino]

    def identity(self, *, whole: bool) -> dict[str, Any]:
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                if whole:
                    return {"name": self.name, "bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
                ends = hashlib.sha256(file.read(_CHUNK))
                file.seek(max(0, size - _CHUNK))
                ends.update(file.read(_CHUNK))
        except OSError as error:
            raise DataError("cannot be read", place=self.name, got=error.strerror or str(error)) from None
        return {"name": self.name, "bytes": size, "sha256_of_ends": ends.hexdigest()}


class TextFile(RowFile):
    """A file of UTF-8 text, plain or compressed; a byte order mark and CRLF line ends are accepted."""

    @contextmanager
    def opened(self, offset: int = 0) -> Iterator[Callable[[int], bytes]]:
        """Open the file at an uncompressed byte offset and give its `read(size)` function.

        Raises:
            DataError: the file can't be read, or its compression is damaged.
        """
        import pyarrow as pa

        compression = COMPRESSION.get(self.path.suffix)
        try:
            if compression is None:
                with self.path.open("rb") as file:
                    file.seek(offset)
                    yield file.read
                return
            with pa.input_stream(self.name, compression=compression) as stream:
                while offset > 0 and (skipped := len(stream.read(min(offset, _CHUNK)))):
                    offset -= skipped
                yield stream.read
        except (OSError, pa.ArrowException) as error:
            problem, fix = "cannot be read", None
            if compression and not isinstance(error, FileNotFoundError | PermissionError):
                problem, fix = f"the {compression} stream is damaged or incomplete", "copy or compress the file again"
                if not self._begins_as(compression):
                    problem, fix = f"isn't a {compression} file, though its name says so", f"name it {self.path.stem}"
            raise DataError(
                problem, place=self.name, got=getattr(error, "strerror", None) or str(error), fix=fix
            ) from None

    def _begins_as(self, compression: str) -> bool:
        """Return whether the file's first bytes are those of a compression."""
        with self.path.open("rb") as file:
            head = file.read(8)
        return any(head.startswith(magic) for magic, name in _MAGIC.items() if name == compression)

    def lines(self, offset: int) -> Iterator[tuple[bytes, bool]]:
        """Yield each line from an uncompressed byte offset on, without its newline, and whether it had one."""
        with self.opened(offset) as read:
            rest = b""
            while chunk := read(_CHUNK):
                *lines, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else [rest + chunk]
                for line in lines:
                    yield line, True
                if len(rest) > _LONGEST_LINE:
                    raise DataError(f"a line is longer than {_LONGEST_LINE >> 20} MiB", place=self.name)
            if rest:
                yield rest, False

    def decode(self, raw: bytes, place: str, begin: int) -> str:
        """Return bytes as text. `begin` is the offset of the first of them in the file, for messages."""
        try:
            return raw.decode("utf-8-sig" if begin == 0 else "utf-8")
        except UnicodeDecodeError as error:
            kind = next((name for magic, name in _MAGIC.items() if begin == 0 and raw.startswith(magic)), None)
            raise DataError(
                "not UTF-8",
                place=place,
                got=f"a {kind} file" if kind else f"byte 0x{raw[error.start]:02x} at offset {begin + error.start}",
                fix="name it by what it holds" if kind in ("gzip", "zstd", "Parquet") else "save the file as UTF-8",
            ) from None
