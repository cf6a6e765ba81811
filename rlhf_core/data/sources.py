"""Where rows come from: files, `datasets` objects, hub names, lists of rows.

A source is read from any `Cursor` on, so that a stream resumes without reading what came before, and gives each row with the
place that a message can name.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.data.files import SUFFIXES, Cursor, JsonLines, ParquetRows, Part, Row
from rlhf_core.errors import DataError

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


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


def check_paths(data: Any) -> None:
    """Raise `DataError` where a file that `data` names isn't there: cheap, so that it can be known before anything slow."""
    for item in data if isinstance(data, list | tuple) else [data]:
        if isinstance(item, str | Path):
            path = Path(item).expanduser()
            if not path.exists() and not _is_hub_name(item):
                raise _no_such_file(item, path)


def has_splits(data: Any) -> bool:
    """Tell whether `data` is of the kinds that come in named splits: a hub name, or a `DatasetDict`, in memory or on disk."""
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        return (path / "dataset_dict.json").exists() or (not path.exists() and _is_hub_name(data))
    if isinstance(data, Sequence):
        return any(isinstance(item, str | Path) and has_splits(item) for item in data)
    import datasets

    return isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict)


def _is_hub_name(name: str | Path) -> bool:
    text = str(name)
    return not isinstance(name, Path) and not text.endswith(SUFFIXES) and _HUB_NAME.fullmatch(text) is not None


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
    if not _is_hub_name(name):
        raise _no_such_file(name, path)
    repository, _, config = text.partition(":")
    return _load(repository, config or None, split, streaming)


def _no_such_file(name: str | Path, path: Path) -> DataError:
    return DataError("no such file", place=str(name), fix=_near_file(path))


def _near_file(path: Path) -> str | None:
    parent = path.parent
    if not parent.is_dir():
        return f"there is no directory {parent} either"
    names = sorted(item.name for item in parent.iterdir() if item.name.endswith(SUFFIXES))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"{parent} has {', '.join(names[:8])}" if names else None


def _directory(path: Path, split: str, streaming: bool) -> Part:
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _dataset(datasets.load_from_disk(str(path)), str(path), split)
    try:
        return _load(str(path), None, split, streaming)
    except DataError as error:
        names = sorted(item.name for item in path.iterdir() if item.name.endswith(SUFFIXES))
        if not names:
            raise
        raise DataError(
            "is a directory that can't be read as one dataset",
            place=str(path),
            got=f"{', '.join(names[:8])}: {error.got}",
            fix=f"name a file, such as {path / names[0]}, or several",
        ) from None


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
        return IterableRows(data, name)
    if isinstance(data, datasets.Dataset):
        return TableRows(data.with_format(None), name)
    raise DataError(
        "cannot be read as data",
        place=name,
        got=type(data).__name__,
        fix="give a path, several paths, a hub name, a `datasets` object, or a list of rows",
    )
