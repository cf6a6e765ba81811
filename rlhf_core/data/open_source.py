"""Where rows come from: files, `datasets` objects, hub names, lists of rows.

A source is read from any `Cursor` on, so that a stream resumes without reading what came before, and gives each row with the
place that a message can name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.run_file import DataFile
from rlhf_core.data.data_source import DataSource, IterableRows, ListRows, TableRows, next_row, reading
from rlhf_core.data.json_files import JsonArray, JsonLines
from rlhf_core.data.row_source import COMPRESSION, Cursor, RowSource
from rlhf_core.data.table_files import Delimited, ParquetRows
from rlhf_core.infra.errors import DataError, first_line, shortened

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

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


def open_source(data: Any, *, split: str = "train", streaming: bool = False) -> DataSource:
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
        return DataSource([part for part, _ in opened], [weight for _, weight in opened])
    if isinstance(data, Sequence):
        return DataSource([ListRows(data)])
    return DataSource([_dataset(data, "data", split)])


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


def _named(name: str | Path, split: str, streaming: bool) -> list[RowSource]:
    if not _exists(name):
        if matched := _matched(name):
            return [_file(path) for path in matched]
        if not _is_hub_name(name):
            raise _no_such_file(name)
        repository, _, config = str(name).partition(":")
        return [_load(repository, config or None, split, streaming)]
    path = _path(name)
    return _directory(path, split, streaming) if path.is_dir() else [_file(path)]


def _file(path: Path) -> RowSource:
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


def _directory(path: Path, split: str, streaming: bool) -> list[RowSource]:
    """Return a folder's parts: what `datasets` saved there, else the files of the split, which must be of one kind."""
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [_dataset(reading(str(path), datasets.load_from_disk, str(path)), str(path), split)]
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


def _first_columns(part: RowSource) -> frozenset[str]:
    row = next_row(part.rows(Cursor()), part, Cursor())
    return frozenset(map(str, row.values)) if row is not None else frozenset()


def _load(name: str, config: str | None, split: str, streaming: bool) -> RowSource:
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


def _dataset(data: Any, name: str, split: str) -> RowSource:
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
