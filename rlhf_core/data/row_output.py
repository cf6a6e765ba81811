"""A file that rows are written to: one JSON object per line, appended whole, and continued where a stop left it.

Beside `NAME.jsonl` stands its record, of what its rows depend on: `NAME.run.json`, say. A file is continued only by a run that
would have written the same rows. What is in a file stays there until the first new row can be written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.files import lock_file, read_json, remove_tree, replace_json, storage_errors

_REPLACE = "choose another `--output`, or `--overwrite` replaces it"


@dataclass(frozen=True)
class RowOutputKind:
    """What a kind of file holds, and how its record is read."""

    ending: str
    """Of the record's name: `.run.json`."""
    depends_on: str
    """What its rows were made by, in words: "what its rows were sampled from"."""
    inputs: str
    """What must be as it was for a file to be continued: "options, models or prompts"."""
    changes: Callable[[Mapping[str, Any], Mapping[str, Any]], Sequence[str]]
    """The differences between the record of a file and the one of this run, one text each. It may raise what reading a dict
    raises where the first isn't such a record."""

    def record_path(self, path: Path) -> Path:
        """Return where the record of a file stands: `out.jsonl` → `out.run.json`."""
        return path.with_suffix(self.ending)

    def check_output(self, path: Path, *, resume: bool, overwrite: bool) -> None:
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
        filled, record = path.exists() and path.stat().st_size > 0, self.record_path(path)
        if filled and not (resume or overwrite):
            fix = "`--resume` continues it, `--overwrite` replaces it" if record.exists() else _REPLACE
            raise StorageError("the file exists", place=str(path), fix=fix)
        if filled and resume and not record.exists():
            raise StorageError(
                f"the file can't be continued: there is no record of {self.depends_on}",
                place=str(path), got=f"no {record.name} beside it", fix=_REPLACE,
            )  # fmt: skip
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
            if new:  # nothing is left behind where what follows fails
                path.unlink()

    def check_record(self, path: Path, now: Mapping[str, Any]) -> None:
        """Refuse to continue a file that was begun with another record.

        Raises:
            ConfigError: it was; the differences are shown.
            StorageError: there is no such record.
        """
        place = self.record_path(path)
        try:
            changed = self.changes(read_json(place), json.loads(json.dumps(now)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            got = error if isinstance(error, OSError | ValueError) else "another JSON value"
            problem = f"can't be read as the record of {self.depends_on}"
            raise StorageError(problem, place=str(place), got=got, fix=_REPLACE) from None
        if changed:
            raise ConfigError(
                f"{self.inputs} changed since the file was begun",
                place=str(path),
                got=", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else ""),
                fix="resume as it was begun, or `--overwrite` replaces it",
            )


class RowOutput:
    """An open file of rows, locked by one process at a time; a context manager that closes it.

    A file that wasn't there before is removed where nothing is written into it.

    Args:
        path: the file.
        record: what determines the rows, as JSON values.
        resume: keep the rows in it, without the part of a line that a kill may have left.
        overwrite: remove them, and their record, when the first new row is written, or the file is done without one.

    Raises:
        ConfigError: it was begun with another record; the difference is shown.
        StorageError: it exists and is neither to be continued nor replaced, or another process writes it.
    """

    def __init__(
        self, path: Path, kind: RowOutputKind, record: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        self.path, self.kind, self.record = path, kind, dict(record)
        self.written = 0
        """How many whole rows it holds that stay."""
        self._kept, self._cleared, self._made = 0, False, False
        kind.check_output(path, resume=resume, overwrite=overwrite)
        new = not path.exists()
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            locked = lock_file(self._descriptor, path, "writing this file")
            if locked and not os.fstat(self._descriptor).st_nlink:  # whoever had the lock has just removed it
                raise StorageError("another process was writing this file", place=str(path), fix="try again")
            self._made = new and locked
            if os.fstat(self._descriptor).st_size > 0 and not overwrite:
                kind.check_record(path, self.record)
                for line in self._lines():
                    self._kept += len(line)
                    self.written += not line.isspace()
        except BaseException:
            self.close()
            raise

    def _lines(self) -> Iterator[bytes]:
        """Yield its whole lines."""
        with storage_errors(self.path), self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield line

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Yield the rows that were in it when it was opened and stay, each with its place, `file:line`; None for what is no row.

        Lines without anything are no rows, and are passed over.
        """
        end = 0
        for number, line in enumerate(self._lines(), 1):
            end += len(line)
            if end > self._kept:
                return
            if line.isspace():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            yield f"{self.path}:{number}", found if isinstance(found, dict) else None

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Append rows, each as one line: all of them or none.

        Raises:
            StorageError: they can't be written, such as on a full disk; the rows before them are as they were.
        """
        text = b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)
        self._clear()
        before = os.fstat(self._descriptor).st_size
        with storage_errors(self.path, len(text)):
            view = memoryview(text)
            try:
                while len(view):
                    view = view[os.write(self._descriptor, view) :]
            except OSError:
                os.ftruncate(self._descriptor, before)
                raise
        self.written += len(rows)

    def _clear(self) -> None:
        """Remove, once, what doesn't stay in the file: rows that are replaced with their record, or the part of a line."""
        if self._cleared:
            return
        record = self.kind.record_path(self.path)
        if not self._kept:
            remove_tree(record)  # first: rows without their record are never continued
        with storage_errors(self.path):
            os.ftruncate(self._descriptor, self._kept)
        self._cleared = True
        self.note(status="running")

    def note(self, *, status: str | None = None) -> None:
        """Make the rows written so far durable, and write the state of the run into its record.

        Nothing is noted before the first new row, except that the run is `done`.
        """
        if status == "done":
            self._clear()
        if not self._cleared:
            return
        self.record |= ({} if status is None else {"status": status}) | {"written": self.written}
        with storage_errors(self.path):
            os.fsync(self._descriptor)
        replace_json(self.kind.record_path(self.path), self.record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which unlocks it."""
        if self._made and not self._cleared:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
