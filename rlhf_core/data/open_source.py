"""Opens data of any kind as a source of rows: files and patterns of files, folders, hub names, `datasets` objects, lists."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_core.config.run_file import DataFile, grouped_by_share
from rlhf_core.data.data_source import (
    DataSource,
    IterableRows,
    ListRows,
    SourcePart,
    TableRows,
    call_reader,
    next_row,
)
from rlhf_core.data.hub_files import downloaded, is_hub_url, parse_hub_url, repository_of
from rlhf_core.data.json_files import JsonArray, JsonLines
from rlhf_core.data.row_source import COMPRESSION, Cursor, RowEntry, RowSource
from rlhf_core.data.table_files import Delimited, ParquetRows
from rlhf_core.infra.errors import ConfigError, DataError, first_line, shortened
from rlhf_core.infra.found_paths import looked_in, places_of, unexpanded
from rlhf_core.infra.hub_access import ask_hub, offline

log = logging.getLogger(__name__)

_JSON = (".jsonl", ".ndjson", ".json")
_TEXTS = (*_JSON, ".csv", ".tsv")
SUFFIXES = (*_TEXTS, *(end + pack for end in _TEXTS for pack in COMPRESSION), ".parquet")
"""Endings of the file names that can be read."""

_SPLITS = {
    "train": "train",
    "test": "test",
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
}
"""Word in a file's name → the split that the file belongs to."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


def open_source(data: Any, *, split: str = "train", streaming: bool = False, once: bool = False) -> DataSource:
    """Open data of any kind as a source of rows. Files are read when their rows are.

    Args:
        data: a path, a pattern of paths, a folder, a hub name (`owner/name` or `owner/name:config`), a file on the hub
            (`hf://datasets/owner/name/file`), a `datasets` object, a list of rows, or a list of paths and names, each alone or as
            an entry (`{"path": …, "weight": 2}`, see `DataFile`).
        split: which split to take, where the data come in splits.
        streaming: whether `datasets` streams what it loads from the hub, rather than downloading it first.
        once: whether each row comes once, also where an entry has fewer than its `rows`.

    Raises:
        ConfigError: an entry is wrong, or the shares don't add up.
        DataError: nothing of that name exists, it can't be read as data, or the list is empty.
    """
    if isinstance(data, Sequence) and not isinstance(data, str) and not data:
        raise DataError("holds no rows", place="data", got="an empty list")
    entries = data_entries(data)
    if entries is None:
        return DataSource(
            [SourcePart([ListRows(data) if isinstance(data, Sequence) else _dataset(data, "data", split)])]
        )
    groups = grouped_by_share(entries)
    names = entry_names(entries)
    several = len(entries) > 1
    parts: list[SourcePart] = []
    ranges: list[tuple[float, list[int]]] = []
    for share, numbers in groups:
        ranges.append((share, list(range(len(parts), len(parts) + len(numbers)))))
        opened = (_part(entries[number], names[number], split, streaming, known=several) for number in numbers)
        parts += [replace(part, once=once) for part in opened]
    return DataSource(parts, ranges if len(ranges) > 1 else ())


def _part(entry: DataFile, name: str, split: str, streaming: bool, *, known: bool) -> SourcePart:
    """Open one entry of `data`. `known` says whether its rows carry its name."""
    reading = RowEntry(name, tuple(entry.columns.items()), entry.format)
    sources = _named(entry.path, entry.split or split, streaming)
    carried = reading if known or entry.columns or entry.format else None
    return SourcePart(sources, entry.weight, entry.rows, carried)


def data_entries(data: Any) -> list[DataFile] | None:
    """Return the entries of `data`, each a path or hub name and how it is used; None where `data` is rows or a `datasets` object.

    Raises:
        ConfigError: an option of an entry is wrong.
    """
    items = data if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    if not all(isinstance(item, str | Path | DataFile) or _is_entry(item) for item in items):
        return None
    entries: list[DataFile] = []
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            entries.append(DataFile.parse({**item, "path": str(item["path"])}, place=f"data[{number}]"))
        else:
            entries.append(item if isinstance(item, DataFile) else DataFile.model_construct(path=item))
    return entries


def data_files(data: Any) -> list[tuple[str | Path, float]] | None:
    """Return the paths and hub names in `data`, each with its weight; None where `data` is rows or a `datasets` object.

    Raises:
        ConfigError: an option of an entry is wrong.
    """
    entries = data_entries(data)
    return None if entries is None else [(entry.path, entry.weight) for entry in entries]


def _is_entry(item: Any) -> bool:
    known = {*DataFile.model_fields}
    return isinstance(item, Mapping) and isinstance(item.get("path"), str | Path) and {*item} <= known


def entry_names(entries: Sequence[DataFile]) -> list[str]:
    """Return a name for each entry: its own, else its file's, with the folder's or a number where two would be alike.

    Raises:
        ConfigError: two entries are given one name.
    """
    given = [entry.name for entry in entries if entry.name is not None]
    if twice := next((name for name in given if given.count(name) > 1), None):
        raise ConfigError("two entries have one name", place="data", got=twice, fix="give each another `name`")
    short = [entry.name or _short_name(entry.path) for entry in entries]
    long = [entry.name or _short_name(entry.path, folders=1) for entry in entries]
    names: list[str] = []
    for own, longer in zip(short, long, strict=True):
        name = first = own if short.count(own) == 1 else longer
        number = 1
        while name in names:
            number += 1
            name = f"{first}_{number}"
        names.append(name)
    return names


def _short_name(path: str | Path, folders: int = 0) -> str:
    """Return the last part of a path or hub name, without its ending, and so many folders before it, as a word."""
    pieces = [piece for piece in re.split(r"[/\\]", str(path)) if piece.strip(".~") and not {*piece} & {*"*?["}]
    kept = pieces[-1 - folders :] or ["data"]
    end = next((end for end in sorted(SUFFIXES, key=len, reverse=True) if kept[-1].casefold().endswith(end)), "")
    text = "_".join([*kept[:-1], kept[-1][: len(kept[-1]) - len(end)]])
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.-") or "data"


def check_paths(data: Any) -> None:
    """Raise `DataError` where `data` names a file that doesn't exist. Reads nothing, so it can run before a model is loaded."""
    for path, _ in data_files(data) or []:
        if is_hub_url(path):
            parse_hub_url(str(path))
        elif not _exists(path) and not _is_hub_name(path) and not matching_files(path):
            raise _no_such_file(path)


def has_splits(data: Any) -> bool:
    """Return whether `data` come in named splits: a hub name, a `DatasetDict`, or a folder whose file names tell the split."""
    files = data_files(data)
    if files is not None:
        return any(_has_splits(path) for path, _ in files)
    if isinstance(data, Sequence):
        return False
    import datasets

    return isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict)


def _has_splits(name: str | Path) -> bool:
    if is_hub_url(name):
        return repository_of(name) is not None
    if not _exists(name):
        return _is_hub_name(name)
    return (_path(name) / "dataset_dict.json").exists() or bool(_splits(_files(_path(name))))


def _exists(name: str | Path) -> bool:
    try:
        return _path(name).exists()
    except (OSError, ValueError):  # Too long for a path, or with a NUL in it.
        return False


def matching_files(name: str | Path) -> list[Path]:
    """Return the files that a pattern such as `rows/*.jsonl` matches, in the order of their names."""
    return [path for path in _matched(name) if path.is_file()]


def _matched(name: str | Path) -> list[Path]:
    """Return the files and folders that a pattern matches, in the order of their names."""
    if not {*str(name)} & {*"*?["}:
        return []
    path = _path(name)
    try:
        return sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
    except (OSError, ValueError, NotImplementedError):  # Not a valid pattern.
        return []


def _path(name: str | Path) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # No such user's home.
        return Path(name)


def _is_hub_name(name: str | Path) -> bool:
    """Return whether a name could be a dataset's on the hub; nothing is looked up."""
    text = str(name)
    named = not isinstance(name, Path) and not text.endswith(SUFFIXES) and len(text) <= 200
    return named and _HUB_NAME.fullmatch(text) is not None


def _named(name: str | Path, split: str, streaming: bool) -> list[RowSource]:
    """Return the sources that a path, pattern, folder or hub name stands for."""
    if is_hub_url(name):
        if (address := repository_of(name)) is not None:
            return [_load(address.name, address.config, split, streaming, address.revision)]
        return [_file(path) for path in downloaded(str(name))]
    if not _exists(name):
        if matched := matching_files(name):
            return [_file(path) for path in matched]
        if not _is_hub_name(name):
            raise _no_such_file(name)
        repository, _, config = str(name).partition(":")
        return [_load(repository, config or None, split, streaming)]
    path = _path(name)
    return _directory(path, split, streaming) if path.is_dir() else [_file(path)]


def _file(path: Path) -> RowSource:
    """Return the reader for a file, chosen by the ending of its name."""
    name = path.name.casefold()
    if not name.endswith(SUFFIXES):
        raise _unknown_kind(path)
    _refuse_pointer(path)
    if name.endswith(".parquet"):
        return ParquetRows(path)
    name = name.removesuffix(path.suffix) if path.suffix in COMPRESSION else name
    if name.endswith((".csv", ".tsv")):
        return Delimited(path)
    array = JsonArray(path)
    return array if name.endswith(".json") and array.holds_array() else JsonLines(path)


def _refuse_pointer(path: Path) -> None:
    """Refuse what Git leaves in place of a large file that wasn't fetched."""
    try:
        with path.open("rb") as file:
            pointer = file.read(64).startswith(b"version https://git-lfs")
    except OSError:  # Reading the rows raises a better error.
        return
    if pointer:
        fix = "`git lfs install && git lfs pull` in that repository, or `hf download --repo-type dataset`"
        raise DataError("is a pointer of Git LFS, not the file itself", place=str(path), fix=fix)


def _unknown_kind(path: Path) -> DataError:
    """Return the error for a file whose name doesn't say what it is, with the ending that its content suggests."""
    with path.open("rb") as handle:
        start = handle.read(4096)
    kinds = (
        f"files that can be read end in {', '.join((*_TEXTS, '.parquet'))}, texts also with {', '.join(COMPRESSION)}"
    )
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    end: str | None = None
    if start.startswith(b"PAR1"):
        end = ".parquet"
    elif head.startswith((b"{", b"[")):
        end = ".json" if head.startswith(b"[") else ".jsonl"
    elif b"\0" not in start and (line := head.partition(b"\n")[0]):
        end = ".tsv" if b"\t" in line else ".csv" if b"," in line else None
    if start.startswith(b"PK") and path.suffix.casefold() in (".xlsx", ".xlsm", ".ods"):
        return DataError(
            "is a spreadsheet", place=str(path), fix="save it as CSV, whose columns are read by their names"
        )
    if path.suffix.casefold() in (".txt", ".md") and end is None:
        kinds = f'write each text as a row, `{{"text": "…"}}` on a line of a file .jsonl; {kinds}'
    looks = f"its content looks like {end[1:]}: name it {path.with_suffix(end).name}; " if end is not None else ""
    return DataError("unknown kind of file", place=str(path), fix=f"{looks}{kinds}")


def _no_such_file(name: str | Path) -> DataError:
    """Return the error for a path that doesn't exist, with the nearest name as a suggestion."""
    shown = str(name)
    if len(shown) > 200 or not shown.isprintable():
        return DataError("no such file", place="data", got=shortened(shown), fix="give the path of a file of rows")
    if {*shown} & {*"*?["} and unexpanded(shown) is None:
        folders = [str(path) for path in _matched(name) if path.is_dir()]
        got = f"the folders {', '.join(folders[:4])}" if folders else None
        fix = f"write `{shown.rstrip('/')}/*.jsonl` for the files in them" if folders else _near_of(name)
        return DataError(f"no file matches this pattern{looked_in(name)}", place=shown, got=got, fix=fix)
    return DataError(f"no such file{looked_in(name)}", place=shown, fix=unexpanded(shown) or _near_of(name))


def _near_of(name: str | Path) -> str | None:
    """Return a hint for a path that doesn't exist: a file of a similar name, wherever it was looked for."""
    paths = [_path(one) for one in places_of(name)]
    hints = [_near_file(path) for path in paths]
    near = (hint for hint in hints if hint is not None and hint.startswith("did you mean"))
    there = (hint for path, hint in zip(paths, hints, strict=True) if path.parent.is_dir())
    return next(near, None) or next(there, None) or hints[0]


def _near_file(path: Path) -> str | None:
    """Return a hint for a path that doesn't exist: the file of a similar name, or what its folder has."""
    parent = path.parent
    if not parent.is_dir():
        return f"there is no directory {parent} either"
    names = sorted(item.name for item in parent.iterdir() if item.name.endswith(SUFFIXES))
    folders = [item.name for item in parent.iterdir() if item.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=8, cutoff=0.4)
    # A suffix that is the same makes no name similar.
    near = [one for one in near if difflib.SequenceMatcher(None, _stem(one), _stem(path.name)).ratio() >= 0.5]
    near = near or difflib.get_close_matches(path.name, folders)
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"{parent} has {', '.join(names[:8])}" if names else None


def _stem(name: str) -> str:
    """Return a file's name without its suffixes."""
    return name.partition(".")[0]


def _directory(path: Path, split: str, streaming: bool) -> list[RowSource]:
    """Return a folder's sources: what `datasets` saved there, else the files of the split.

    Raises:
        DataError: no file is of the split, or the files have different columns.
    """
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [_dataset(call_reader(str(path), datasets.load_from_disk, str(path)), str(path), split)]
    files = _files(path)
    if not files:
        _refuse_other_folder(path)
    if not files or {*split} & {
        *"[+"
    }:  # `datasets` itself reads slices and sums of splits: `train[:10%]`, `train+test`.
        return [_load(str(path), None, split, streaming)]
    splits = _splits(files)
    if splits and split not in splits:
        raise DataError(
            f"has no files of the split `{split}`",
            place=str(path),
            got=", ".join(file.name for file in files[:8]),
            fix=f"set `dataset.split` (for `eval_data`: `dataset.eval_split`) to {' or '.join(splits)}, or name the files",
        )
    sources = [_file(file) for file in (splits[split] if splits else files)]
    columns = {source.name: _first_columns(source) for source in sources}
    if len({*columns.values()}) > 1:
        raise DataError(
            "the files in this folder have different columns, so they aren't one dataset",
            place=str(path),
            got="; ".join(f"{Path(name).name}: {', '.join(sorted(held))}" for name, held in list(columns.items())[:4]),
            fix=f"name a file, such as {sources[0].name}, or several",
        )
    return sources


def _refuse_other_folder(path: Path) -> None:
    """Raise `DataError` for a folder without files of rows that is empty, or holds something else."""
    held = sorted(item.name for item in path.iterdir())
    if not held:
        raise DataError("is an empty folder", place=str(path), fix="name a file of rows, or a folder that has some")
    if {"config.json", "adapter_config.json", "tokenizer.json"} & {*held}:
        raise DataError("is a model's directory, and holds no rows", place=str(path), fix="name a file of rows")
    inside = [item for item in held if (path / item).is_dir() and _files(path / item)]
    if inside:
        listed = ", ".join(str(path / item) for item in inside[:4])
        raise DataError("holds no files of rows itself", place=str(path), fix=f"name a folder in it: {listed}")


def _files(path: Path) -> list[Path]:
    """Return the files of rows in a folder, or in its subfolder `data` (a downloaded repository), in the order of their names."""
    for folder in (path, path / "data"):
        if folder.is_dir():
            files = sorted(
                item for item in folder.iterdir() if item.name.casefold().endswith(SUFFIXES) and item.is_file()
            )
            if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
                return []  # a model
            files = [
                item
                for item in files
                if not item.name.startswith((".", "_")) and item.stem not in ("dataset_infos", "dataset_info")
            ]
            if files:
                return files
    return []


def _splits(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return split → files, where every file's name tells its split (`train-00000-of-00002.parquet`); else nothing."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.name.casefold())
        found = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        if found is None:
            return {}
        splits.setdefault(found, []).append(file)
    return splits


def _first_columns(source: RowSource) -> frozenset[str]:
    row = next_row(source.rows(Cursor()), source, Cursor())
    return frozenset(map(str, row.values)) if row is not None else frozenset()


def _load(name: str, config: str | None, split: str, streaming: bool, revision: str | None = None) -> RowSource:
    """Load a hub name, or a folder of a kind that only `datasets` knows."""
    import datasets

    unreachable = None
    try:
        unreachable = None if _exists(name) else ask_hub(name, "dataset")
        given: dict[str, Any] = {} if revision is None else {"revision": revision}
        with offline(unreachable is not None):
            loaded = datasets.load_dataset(name, config, split=split, streaming=streaming, **given)
    except Exception as error:  # Loading scripts, decoders and the network raise errors of any kind.
        offline_too = unreachable is not None and isinstance(error, ConnectionError)
        raise _not_loaded(name, unreachable if offline_too else first_line(error)) from None
    if unreachable is not None:
        log.warning("%s: %s; the copy in its cache is taken", name, unreachable)
    return _dataset(loaded, name, split)


def _not_loaded(name: str, why: str | None) -> DataError:
    near = _near_of(name) or ""
    return DataError(
        f"not a file{looked_in(name)}, and `datasets.load_dataset` cannot load it",
        place=name,
        got=why,
        fix=near
        if near.startswith("did you mean")
        else "check the name, `dataset.split` (for `eval_data`: `dataset.eval_split`), the network, and for a gated set the"
        " token",
    )


def _dataset(data: Any, name: str, split: str) -> RowSource:
    """Return a `datasets` object as a source; of a dictionary of splits, the one asked for."""
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
        "not data that can be read",
        place=name,
        got=type(data).__name__,
        fix=_made_rows(data) or "give a path, several paths, a hub name, a `datasets` object, or a list of rows",
    )


def _made_rows(data: Any) -> str | None:
    """Return how rows are made of an object that holds some in another form; None of any other object."""
    if type(data).__name__ == "DataFrame":
        make = (
            "datasets.Dataset.from_polars"
            if type(data).__module__.startswith("polars")
            else "datasets.Dataset.from_pandas"
        )
    elif isinstance(data, Mapping):
        lists = bool(data) and all(isinstance(column, list) for column in data.values())
        make = "datasets.Dataset.from_dict" if lists else "datasets.DatasetDict"
    elif isinstance(data, Iterator):
        make = "list"
    else:
        return None
    return f"give `{make}(…)` of it"
