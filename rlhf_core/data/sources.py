"""Where rows come from: files, `datasets` objects, hub names, lists of rows.

A source is read from any `Cursor` on, so that a stream resumes without reading what came before, and gives each row with the
place that a message can name.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.run import DataFile
from rlhf_core.data.files import COMPRESSION, Cursor, Part, Row
from rlhf_core.data.json_files import JsonArray, JsonLines
from rlhf_core.data.tables import Delimited, ParquetRows
from rlhf_core.infra.errors import DataError, RLHFError, describe_error, first_line, shortened

_JSON = (".jsonl", ".ndjson", ".json")
_TEXTS = (*_JSON, ".csv", ".tsv")
SUFFIXES = (*_TEXTS, *(end + pack for end in _TEXTS for pack in COMPRESSION), ".parquet")
"""File names that are read, by their end."""

_SPLITS = {
    "train": "train",
    "test": "test",
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
}
"""Words in a file's name → the split that its rows are of."""

_BYTES_A_ROW = 1024
"""What a row in memory counts for, where sizes are compared."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


class Rows(Part):
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

    @property
    def size(self) -> float:
        return math.inf

    def rows(self, start: Cursor) -> Iterator[Row]:
        stream = self.stream.skip(start.line) if start.line else self.stream
        for line, values in enumerate(stream, start.line):
            row = start.row + line - start.line
            yield Row(row, f"{self.name}[{line}]", values, Cursor(start.part, row + 1, line + 1))


class Source:
    """The parts of some data, read one after the other, each row as often as its part's weight says.

    A weight's fraction takes some of the rows once more: which, is a function of the part and the line alone.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[float] | None = None) -> None:
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
            while (row := _next(rows, part, cursor)) is not None:
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
            _reading(part.name, part.identity, whole=whole) | ({"weight": weight} if weight != 1 else {})
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]


def _next(rows: Iterator[Row], part: Part, cursor: Cursor) -> Row | None:
    return _reading(f"{part.name}, after {cursor.line} rows" if cursor.line else part.name, next, rows, None)


def _reading(place: str, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what `read` does. Whatever a library raises while it reads is a fault of the data."""
    try:
        return read(*args, **options)
    except RLHFError:
        raise
    except Exception as error:
        raise DataError("cannot be read", place=place, got=describe_error(error, lines=2)) from error


def open_source(data: Any, *, split: str = "train", streaming: bool = False) -> Source:
    """Find the rows of `data`: a path, a directory, a hub name (`owner/name` or `owner/name:config`), a `datasets` object,
    a list of rows, or a list of paths and names, each alone or with a weight (`{"path": …, "weight": 2}`).

    Raises:
        DataError: there are none, or nothing of that name.
    """
    if isinstance(data, Sequence) and not isinstance(data, str) and not data:
        raise DataError("holds no rows", place="data", got="an empty list")
    files = data_files(data)
    if files is not None:
        opened = [(part, weight) for path, weight in files for part in _named(path, split, streaming)]
        return Source([part for part, _ in opened], [weight for _, weight in opened])
    if isinstance(data, Sequence):
        return Source([Rows(data)])
    return Source([_dataset(data, "data", split)])


def data_files(data: Any) -> list[tuple[str | Path, float]] | None:
    """Return the files, folders and hub names that `data` lists, each with its weight; None where it holds rows itself.

    Raises:
        ConfigError: a weight isn't a positive number.
    """
    items = data if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    if not all(isinstance(item, str | Path) or _is_weighted(item) for item in items):
        return None
    files: list[tuple[str | Path, float]] = []
    for number, item in enumerate(items):
        if isinstance(item, str | Path):
            files.append((item, 1.0))
        else:
            file = DataFile.parse({**item, "path": str(item["path"])}, place=f"data[{number}]")
            files.append((file.path, file.weight))
    return files


def _is_weighted(item: Any) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get("path"), str | Path) and {*item} <= {"path", "weight"}


def check_paths(data: Any) -> None:
    """Raise `DataError` where a file that `data` names isn't there: cheap, so that it can be known before anything slow."""
    for path, _ in data_files(data) or []:
        if not _exists(path) and not _is_hub_name(path) and not _matched(path):
            raise _no_such_file(path)


def has_splits(data: Any) -> bool:
    """Tell whether `data` is of the kinds that come in named splits: a hub name, a folder whose files bear such names, or a
    `DatasetDict`, in memory or on disk."""
    files = data_files(data)
    if files is not None:
        return any(_has_splits(path) for path, _ in files)
    if isinstance(data, Sequence):
        return False
    import datasets

    return isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict)


def _has_splits(name: str | Path) -> bool:
    if not _exists(name):
        return _is_hub_name(name)
    return (_path(name) / "dataset_dict.json").exists() or bool(_splits(_files(_path(name))))


def _exists(name: str | Path) -> bool:
    try:
        return _path(name).exists()
    except (OSError, ValueError):  # Too long, or a NUL in it: no name of a file.
        return False


def _matched(name: str | Path) -> list[Path]:
    """Return the files that a pattern such as `rows/*.jsonl` matches, by name."""
    if not {*str(name)} & {*"*?["}:
        return []
    path = _path(name)
    try:
        found = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))
        return sorted(item for item in found if item.is_file())
    except (OSError, ValueError, NotImplementedError):  # No pattern that can be looked for.
        return []


def _path(name: str | Path) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # No such user's home.
        return Path(name)


def _is_hub_name(name: str | Path) -> bool:
    text = str(name)
    named = not isinstance(name, Path) and not text.endswith(SUFFIXES) and len(text) <= 200
    return named and _HUB_NAME.fullmatch(text) is not None


def _named(name: str | Path, split: str, streaming: bool) -> list[Part]:
    if not _exists(name):
        if matched := _matched(name):
            return [_file(path) for path in matched]
        if not _is_hub_name(name):
            raise _no_such_file(name)
        repository, _, config = str(name).partition(":")
        return [_load(repository, config or None, split, streaming)]
    path = _path(name)
    return _directory(path, split, streaming) if path.is_dir() else [_file(path)]


def _file(path: Path) -> Part:
    name = path.name.casefold()
    if not name.endswith(SUFFIXES):
        raise DataError("unknown kind of file", place=str(path), fix=f"name it by what it holds: {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        return ParquetRows(path)
    name = name.removesuffix(path.suffix) if path.suffix in COMPRESSION else name
    if name.endswith((".csv", ".tsv")):
        return Delimited(path)
    array = JsonArray(path)
    return array if name.endswith(".json") and array.is_one() else JsonLines(path)


def _no_such_file(name: str | Path) -> DataError:
    shown = str(name)
    if len(shown) > 200 or not shown.isprintable():
        return DataError("no such file", place="data", got=shortened(shown), fix="give the path of a file of rows")
    return DataError("no such file", place=shown, fix=_near_file(_path(name)))


def _near_file(path: Path) -> str | None:
    parent = path.parent
    if not parent.is_dir():
        return f"there is no directory {parent} either"
    names = sorted(item.name for item in parent.iterdir() if item.name.endswith(SUFFIXES))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"{parent} has {', '.join(names[:8])}" if names else None


def _directory(path: Path, split: str, streaming: bool) -> list[Part]:
    """Return a folder's parts: what `datasets` saved there, else the files of the split, which must be of one kind."""
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [_dataset(_reading(str(path), datasets.load_from_disk, str(path)), str(path), split)]
    files = _files(path)
    if not files or {*split} & {*"[+"}:  # A slice of a split, or several together, as `datasets` writes them.
        return [_load(str(path), None, split, streaming)]
    splits = _splits(files)
    if splits and split not in splits:
        raise DataError(
            f"has no files of the split `{split}`",
            place=str(path),
            got=", ".join(file.name for file in files[:8]),
            fix=f"set `dataset.split` (for `eval_data`: `dataset.eval_split`) to {' or '.join(splits)}, or name the files",
        )
    parts = [_file(file) for file in (splits[split] if splits else files)]
    columns = {part.name: _first_columns(part) for part in parts}
    if len({*columns.values()}) > 1:
        raise DataError(
            "is a directory that can't be read as one dataset",
            place=str(path),
            got="; ".join(f"{Path(name).name}: {', '.join(sorted(held))}" for name, held in list(columns.items())[:4]),
            fix=f"name a file, such as {parts[0].name}, or several",
        )
    return parts


def _files(path: Path) -> list[Path]:
    """Return the files of rows in a folder, or in the folder `data` of a downloaded repository, by name."""
    for folder in (path, path / "data"):
        if folder.is_dir():
            files = sorted(
                item for item in folder.iterdir() if item.name.casefold().endswith(SUFFIXES) and item.is_file()
            )
            files = [
                item
                for item in files
                if not item.name.startswith((".", "_")) and item.stem not in ("dataset_infos", "dataset_info")
            ]
            if files:
                return files
    return []


def _splits(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return files by split, where the name of each tells one (`train-00000-of-00002.parquet`)."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.name.casefold())
        found = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        if found is None:
            return {}
        splits.setdefault(found, []).append(file)
    return splits


def _first_columns(part: Part) -> frozenset[str]:
    row = _next(part.rows(Cursor()), part, Cursor())
    return frozenset(map(str, row.values)) if row is not None else frozenset()


def _load(name: str, config: str | None, split: str, streaming: bool) -> Part:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # Loading scripts, decoders and the network raise errors of any kind.
        raise DataError(
            "is no file here, and `datasets.load_dataset` cannot load it",
            place=name,
            got=first_line(error),
            fix="check the name, `dataset.split` (for `eval_data`: `dataset.eval_split`), the network, and for a gated set the"
            " token",
        ) from None
    return _dataset(loaded, name, split)


def _dataset(data: Any, name: str, split: str) -> Part:
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        if split not in data:
            raise DataError(
                f"has no split `{split}`",
                place=name,
                got=", ".join(data),
                fix="set `dataset.split`, or `dataset.eval_split` for `eval_data`",
            )
        data = data[split]
    if isinstance(data, datasets.IterableDataset):
        return IterableRows(data.with_format(None), name)
    if isinstance(data, datasets.Dataset):
        return TableRows(data.with_format(None), name)
    raise DataError(
        "cannot be read as data",
        place=name,
        got=type(data).__name__,
        fix="give a path, several paths, a hub name, a `datasets` object, or a list of rows",
    )
