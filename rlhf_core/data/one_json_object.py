"""What a JSON file is that holds one object in place of rows: a list of data sets, columns, several arrays, rows by key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.data.columns import KNOWN, folded_name
from rlhf_core.infra.errors import DataError

OVER_LINES = "holds an object over several lines, expected one per line"
_ON_ONE_LINE = "write each object on one line (`jq -c .` does), or all of them as an array in a file .json"
_HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


def object_instead_of_rows(values: Mapping[str, Any], path: Path) -> DataError | None:
    """Return the error for a file that holds one object which is no row; None where it may be one.

    Args:
        values: the object.
        path: the file.
    """
    known = [key for key in values if folded_name(key) in KNOWN]
    held = [value for value in values.values() if isinstance(value, Mapping)]
    if held and len(held) == len(values):
        if all({"file_name", *_HUB_KEYS} & {*value} for value in held):
            return _listed_data_sets(values, path)
        if all(value and all(str(key).isdigit() for key in value) for value in held):
            return _columns(values, path)
        if len(held) > 1 and not known:
            fix = "write the objects alone, one per line, or as an array"
            return DataError("holds rows under keys, expected rows alone", place=str(path), got=_named(values), fix=fix)
    lists = {key: value for key, value in values.items() if isinstance(value, list) and value}
    plain = not any(isinstance(item, Mapping | list) for value in lists.values() for item in value)
    if known and plain and len(values) == len(lists) > 1 and len({*map(len, lists.values())}) == 1:
        return _columns(values, path)
    rows = [key for key, value in lists.items() if all(isinstance(item, Mapping) for item in value)]
    splits = [key for key in rows if key.casefold() in ("train", "test", "validation", "valid", "val", "dev", "eval")]
    if len(splits) > 1:
        fix = "write each to a file of its own"
        return DataError("holds several arrays of rows", place=str(path), got=_named(splits), fix=fix)
    return None


def _listed_data_sets(values: Mapping[str, Any], path: Path) -> DataError:
    """Return the error for the index of data sets that LLaMA-Factory reads, with a data set that it names."""
    files = [entry["file_name"] for entry in values.values() if isinstance(entry.get("file_name"), str)]
    there = [path.parent / name for name in files if (path.parent / name).exists()]
    hub = [str(entry["hf_hub_url"]) for entry in values.values() if entry.get("hf_hub_url")]
    one = next(iter([*map(str, there), *hub, *files]), None)
    such = "" if one is None else f", such as {one}"
    return DataError(
        "lists data sets, as LLaMA-Factory's `dataset_info.json` does, and holds no rows",
        place=str(path),
        got=_named(values),
        fix=f"name the data set itself{such}; what it has under `columns` is `dataset.columns` here",
    )


def _columns(values: Mapping[str, Any], path: Path) -> DataError:
    return DataError(
        "holds columns, expected rows",
        place=str(path),
        got=_named(values),
        fix="write rows; in pandas `table.to_json(FILE, orient='records', lines=True)` does",
    )


def object_over_lines(values: Mapping[str, Any], path: Path) -> DataError:
    """Return the error for a file that begins with an object over several lines."""
    return object_instead_of_rows(values, path) or DataError(OVER_LINES, place=f"{path}:1", fix=_ON_ONE_LINE)


@dataclass(frozen=True)
class ObjectOverLines:
    """An object over several lines of a file that has one object per line."""

    lines: int
    """How many lines it has, its first one among them."""
    error: DataError
    """What is said of it; where it is broken, with the line of the mistake."""


def read_over_lines(lines: Sequence[str], name: str, first: int) -> ObjectOverLines | None:
    """Return the object over several lines that begins with the first of some lines; None where none does.

    Args:
        lines: the first, whose end is reached before the object's, and those that follow (see `belongs`).
        name: of the file.
        first: number of the first line in the file.
    """
    text = "\n".join(lines)
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except RecursionError:
        return None
    except json.JSONDecodeError as error:
        if error.pos < len(lines[0].rstrip()):
            return None
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            found = DataError(
                "an object that begins in this line isn't complete", place=f"{name}:{first}", fix=_ON_ONE_LINE
            )
            return ObjectOverLines(len(lines), found)
        fix = f"repair the object over several lines that begins in line {first:,}, and {_ON_ONE_LINE}"
        place = f"{name}:{first + error.lineno - 1}:{error.colno}"
        return ObjectOverLines(len(lines), DataError("not valid JSON", place=place, got=error.msg, fix=fix))
    count = text.count("\n", 0, end) + 1
    return (
        ObjectOverLines(count, DataError(OVER_LINES, place=f"{name}:{first}", fix=_ON_ONE_LINE)) if count > 1 else None
    )


def belongs(line: str, before: str) -> bool:
    """Return whether a line may be of the object that earlier lines begin: neither a new object, nor after the object's end.

    Args:
        before: the line before it.
    """
    return not line.startswith(("{", "[")) and not before.startswith("}")


def _named(names: Mapping[str, Any] | list[str]) -> str:
    """Return the first of some keys, and how many more there are."""
    keys = [f"`{key}`" for key in names]
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4:,} more" if len(keys) > 4 else "")
