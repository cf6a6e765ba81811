"""Where rows come from: JSONL (plain, .gz, .zst), Parquet, `datasets` objects, hub names, lists of rows.

A source is read from any `Cursor` on, so that a stream resumes without reading what came before, and gives each row with the
place that a message can name. What is wrong with a file is one `DataError`.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.errors import DataError

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*_LINES, *(end + pack for end in _LINES for pack in _COMPRESSION), ".parquet")
"""File names that are read, by their end."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
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


class Rows(Part):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Any], name: str = "data") -> None:
        self.table, self.name = rows, name

    def rows(self, start: Cursor) -> Iterator[Row]:
        for line, values in enumerate(self._from(start.line), start.line):
            place = f"{self.name}[{line}]"
            if not isinstance(values, Mapping):
                raise DataError("expected a row as a mapping of columns", place=place, got=type(values).__name__)
            row = start.row + line - start.line
            yield Row(row, place, values, Cursor(start.part, row + 1, line + 1))

    def _from(self, line: int) -> Iterator[Any]:
        return itertools.islice(self.table, line, None)


class TableRows(Rows):
    """A map-style `datasets.Dataset`, read some rows at a time."""

    def _from(self, line: int) -> Iterator[Any]:
        for first in range(line, len(self.table), 1024):
            columns: Any = self.table[first : first + 1024]
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


class IterableRows(Part):
    """A streaming `datasets.IterableDataset`. Rows before a cursor are skipped by the library."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.name = stream, name

    def rows(self, start: Cursor) -> Iterator[Row]:
        stream = self.stream.skip(start.line) if start.line else self.stream
        for line, values in enumerate(stream, start.line):
            row = start.row + line - start.line
            yield Row(row, f"{self.name}[{line}]", values, Cursor(start.part, row + 1, line + 1))


class Source:
    """The parts of some data, read one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)

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
            empty = cursor.line == 0
            for row in part.rows(cursor):
                empty, cursor = False, row.after
                yield row
            if empty:
                raise DataError("holds no rows", place=part.name, fix="give data with at least one row")

    def identity(self, *, whole: bool) -> list[dict[str, Any]]:
        """Return each part's name and hash; see `Part.identity`."""
        return [part.identity(whole=whole) for part in self.parts]


def open_source(data: Any, *, split: str = "train", streaming: bool = False) -> Source:
    """Find the rows of `data`: a path, a directory, a hub name (`owner/name` or `owner/name:config`), a `datasets` object,
    a list of rows, or a list of paths.

    Raises:
        DataError: there are none, or nothing of that name.
    """
    if isinstance(data, str | Path):
        return Source([_named(data, split, streaming)])
    if isinstance(data, Sequence):
        if not data:
            raise DataError("holds no rows", place="data", got="an empty list")
        if all(isinstance(item, str | Path) for item in data):
            return Source([_named(item, split, streaming) for item in data])
        return Source([Rows(data)])
    return Source([_dataset(data, "data", split)])


def _named(name: str | Path, split: str, streaming: bool) -> Part:
    path = Path(name).expanduser()
    if path.is_dir():
        return _directory(path, split, streaming)
    if path.exists():
        if not path.name.endswith(SUFFIXES):
            raise DataError(
                "unknown kind of file", place=str(path), fix=f"name it by what it holds: {', '.join(SUFFIXES)}"
            )
        return ParquetRows(path) if path.suffix == ".parquet" else JsonLines(path)
    text = str(name)
    if (
        isinstance(name, Path)
        or text.endswith(SUFFIXES)
        or not _HUB_NAME.fullmatch(text)
        or text.startswith((".", "~", "/"))
    ):
        raise DataError("no such file", place=text, fix=_near_file(path))
    repository, _, config = text.partition(":")
    return _load(repository, config or None, split, streaming)


def _near_file(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"there is no directory {parent} either"
    names = sorted(item.name for item in parent.iterdir() if item.name.endswith(SUFFIXES))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"{parent} has {', '.join(names[:8])}" if names else f"{parent} has no data files"


def _directory(path: Path, split: str, streaming: bool) -> Part:
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _dataset(datasets.load_from_disk(str(path)), str(path), split)
    return _load(str(path), None, split, streaming)


def _load(name: str, config: str | None, split: str, streaming: bool) -> Part:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            "is no file here, and `datasets.load_dataset` cannot load it",
            place=name,
            got=first,
            fix="check the name, `dataset.split`, the network, and for a gated set the token",
        ) from None
    return _dataset(loaded, name, split)


def _dataset(data: Any, name: str, split: str) -> Part:
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        if split not in data:
            raise DataError(f"has no split `{split}`", place=name, got=", ".join(data), fix="set `dataset.split`")
        data = data[split]
    if isinstance(data, datasets.IterableDataset):
        return IterableRows(data, name)
    if isinstance(data, datasets.Dataset):
        return TableRows(data.with_format(None), name)
    raise DataError(
        "cannot be read as data",
        place=name,
        got=type(data).__name__,
        fix="give a path, several paths, a hub name, a `datasets` object, or a list of rows",
    )
