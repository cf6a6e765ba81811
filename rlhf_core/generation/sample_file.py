"""The file that sampled rows are written to: one JSON object per line, appended whole, and continued where a stop left it.

Beside `NAME.jsonl` stands `NAME.run.json`, the record of what the rows were sampled from. A file is continued only by a run that
would have written the same rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rlhf_core.config.yaml_file import flatten
from rlhf_core.infra.errors import ConfigError, StorageError, shortened
from rlhf_core.infra.files import lock_file, read_json, remove_tree, replace_json, storage_errors

_FIX = "`--resume` continues it, `--overwrite` replaces it"


class SampleFile:
    """An open file of sampled rows, locked by one process at a time; a context manager that closes it.

    Args:
        path: the file.
        descriptor: it, open for appending.
        record: what its rows are sampled from, with the state of the run.
        written: how many whole rows it holds.
    """

    def __init__(self, path: Path, descriptor: int, record: dict[str, Any], written: int) -> None:
        self.path, self.record, self.written = path, record, written
        self._descriptor = descriptor

    @classmethod
    def check(cls, path: Path, *, resume: bool, overwrite: bool) -> None:
        """Refuse a file that exists, before anything expensive is loaded, unless it is to be continued or replaced.

        Raises:
            ConfigError: both are asked for.
            StorageError: the file exists and neither is, it can't be continued, or its directory can't be written.
        """
        if resume and overwrite:
            raise ConfigError(
                "a file is either continued or replaced", place="--resume and --overwrite", fix="choose one"
            )
        if path.is_dir():
            raise StorageError("is a directory, not a file", place=str(path), fix="choose another `--output`")
        filled = path.exists() and path.stat().st_size > 0
        recorded = record_path(path).exists()
        if filled and not (resume or overwrite):
            fix = _FIX if recorded else "choose another `--output`, or `--overwrite` replaces it"
            raise StorageError("the file exists", place=str(path), fix=fix)
        if filled and resume and not recorded:
            raise StorageError(
                "the file can't be continued: there is no record of what its rows were sampled from",
                place=str(path),
                got=f"no {record_path(path).name} beside it",
                fix="choose another `--output`, or `--overwrite` replaces it",
            )
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))

    @classmethod
    def open(
        cls, path: Path, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, resume: bool, overwrite: bool
    ) -> Self:
        """Lock a file and make it ready to be appended to.

        Args:
            record: what determines the rows: options, models, prompts.
            rows: the input's columns of each row that will be written, in order: those in the file must have them.
            resume: keep the rows in it, without the part of a line that a kill may have left.
            overwrite: remove them.

        Raises:
            ConfigError: it was begun with another record; the difference is shown.
            StorageError: it exists and is neither to be continued nor replaced, holds other rows, or another process writes it.
        """
        cls.check(path, resume=resume, overwrite=overwrite)
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            lock_file(descriptor, path, "writing this file")
            written = 0
            kept = dict(record)
            if overwrite:
                remove_tree(record_path(path))
                with storage_errors(path):
                    os.ftruncate(descriptor, 0)
            elif path.stat().st_size > 0:
                _check_record(path, record)
                written = _whole_rows(path, descriptor, rows)
            opened = cls(path, descriptor, kept, written)
            opened.note(status="running", rows=len(rows), written=written)
        except BaseException:
            os.close(descriptor)
            raise
        return opened

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row as one line, whole or not at all.

        Raises:
            StorageError: it can't be written, such as on a full disk; the rows before it are as they were.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        with storage_errors(self.path, len(line)):
            view = memoryview(line)
            try:
                while len(view):
                    view = view[os.write(self._descriptor, view) :]
            except OSError:
                os.ftruncate(self._descriptor, before)
                raise
        self.written += 1

    def note(self, **fields: Any) -> None:
        """Make the rows written so far durable, and write the state of the run into its record."""
        with storage_errors(self.path):
            os.fsync(self._descriptor)
        self.record |= {"written": self.written} | fields
        replace_json(record_path(self.path), self.record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file, which unlocks it."""
        os.close(self._descriptor)


def record_path(path: Path) -> Path:
    """Return where the record of a file of sampled rows stands: `out.jsonl` → `out.run.json`."""
    return path.with_suffix(".run.json")


def recorded_batch_size(path: Path) -> int | None:
    """Return how many prompts the sampler got at once in the run that began a file; None where there is no such record."""
    try:
        size = read_json(record_path(path))["options"]["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size > 0 else None


def _check_record(path: Path, now: Mapping[str, Any]) -> None:
    """Refuse to continue a file that was begun with other options, models or prompts."""
    place = record_path(path)
    try:
        before = read_json(place)
        if not isinstance(before, dict) or not {"options", "models", "prompts"} <= before.keys():
            raise ValueError("no record of sampling")
    except (OSError, ValueError) as error:
        fix = "choose another `--output`, or `--overwrite` replaces it"
        raise StorageError(
            "can't be read as the record of sampled rows", place=str(place), got=error, fix=fix
        ) from None
    old, new = (
        {name: record.get(name) for name in ("options", "models", "rewards", "prompts")} for record in (before, now)
    )
    old, new = flatten(old), flatten(json.loads(json.dumps(new)))
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if changed:
        lines = [
            f"{name.removeprefix('options.')}: {shortened(old.get(name))} → {shortened(new.get(name))}"
            for name in changed
        ]
        raise ConfigError(
            "options, models or prompts changed since the file was begun",
            place=str(path),
            got=", ".join(lines[:4]) + (f" and {len(lines) - 4} more" if len(lines) > 4 else ""),
            fix="resume with those that it was begun with, or `--overwrite` replaces it",
        )


def _whole_rows(path: Path, descriptor: int, rows: Sequence[Mapping[str, Any]]) -> int:
    """Remove the part of a line at a file's end, which a kill may have left, and return how many rows remain.

    Raises:
        StorageError: a line isn't a row of these prompts, or there are more rows than prompts.
    """
    whole = count = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            place, fix = f"{path}:{count + 1}", "restore the file as it was written, or `--overwrite` replaces it"
            if count == len(rows):
                raise StorageError("the file has more rows than there are prompts", place=place, fix=fix)
            try:
                found = json.loads(line)
                same = all(found[name] == value for name, value in json.loads(json.dumps(rows[count])).items())
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise StorageError("isn't the row that these prompts have there", place=place, fix=fix)
            whole, count = whole + len(line), count + 1
    with storage_errors(path):
        os.ftruncate(descriptor, whole)
    return count
