"""The run directory: what was asked, what it ran on, what happened, in files that people and programs can read.

Only the first process writes. Every file but the two logs is put in place whole.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf_core.config.yaml_file import dump_yaml, load_yaml
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.files import (
    fsync_directory,
    leftover_of,
    lock_directory,
    read_json,
    remove_tree,
    replace_file,
    replace_json,
    storage_errors,
)
from rlhf_core.infra.redact import redact_text
from rlhf_core.infra.version import __version__

Status = Literal["running", "done", "stopped", "failed"]

_LOCK = "run.lock"
_MEND = "put a whole copy of it back, or choose a new directory"
_WRITTEN = re.compile(
    r"(run|status|data|models)\.json|config(\.input)?\.yaml|command\.txt|(metrics|samples)\.jsonl|reference\.safetensors|model(_\w+)?"
)
"""What stands in a run's directory after it was written or replaced as a whole."""


class RunDirectory:
    """The directory of one run, held by one process at a time; without a path it keeps nothing."""

    def __init__(
        self, path: Path | None, record: dict[str, Any], *, continued: bool = False, lock: int | None = None
    ) -> None:
        self.path, self.record, self.continued, self._lock = path, record, continued, lock

    @classmethod
    def open(cls, path: Path | None, *, resume: bool, overwrite: bool) -> RunDirectory:
        """Take a directory for a run, before anything expensive is loaded.

        An empty or missing directory starts a run, also with `resume`. `resume` continues a run of ours; `overwrite` removes
        one first, and nothing else.

        Raises:
            StorageError: it can't be written, isn't empty, isn't a run of ours, or another process works in it.
            ConfigError: both options, or `resume` without a directory.
        """
        if resume and overwrite:
            raise ConfigError("a run is either continued or replaced", got="--resume and --overwrite", fix="choose one")
        record = _new_record()
        if path is None:
            if resume or overwrite:
                raise ConfigError("no run directory is set", place="output", fix="set `output`")
            return cls(None, record)
        _make_directory(path)
        new = not (path / _LOCK).exists()
        lock = lock_directory(path, _LOCK, "working in this run directory")  # and so tries whether it can be written
        try:
            continued = _settle(path, resume=resume, overwrite=overwrite)
            if continued:
                record |= _continued_record(path)
        except BaseException:
            if new and not (path / "run.json").exists():
                remove_tree(path / _LOCK)  # what isn't ours is left as it was
            _release(lock)
            raise
        opened = cls(path, record, continued=continued, lock=lock)
        opened.update(status="running")
        return opened

    def update(self, **fields: Any) -> None:
        """Change fields of `run.json`, and of `status.json`, the short one for launchers."""
        self.record |= fields
        if self.path is None:
            return
        self._write("run.json", self.record)
        short = {name: self.record.get(name) for name in ("status", "exit_code", "step", "message")}
        self._write("status.json", short)

    def end(
        self,
        status: Status,
        exit_code: int,
        *,
        step: int,
        message: str | None = None,
        consequence: bool = False,
    ) -> None:
        """Note how the run ended. Of a `consequence`, a fault that another process noted first is the cause."""
        noted = self.read("status.json") or {}
        if consequence and isinstance(noted, dict) and noted.get("status") == "failed":
            exit_code, message = noted["exit_code"], noted["message"]
        self.update(status=status, exit_code=exit_code, step=step, message=message, ended=_now())

    @staticmethod
    def fault_noted(path: Path | None) -> bool:
        """Tell whether a process of the run has noted a fault."""
        try:
            noted = read_json(path / "status.json") if path is not None else None
        except (OSError, ValueError):
            return False
        return isinstance(noted, dict) and noted.get("status") == "failed"

    def write_inputs(self, options: Mapping[str, Any], inputs: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
        """Write what was asked: `config.input.yaml` as given, `config.yaml` resolved, `command.txt`; secrets redacted.

        Args:
            options: every option with its value, in the shape of a configuration file.
            inputs: may hold the texts `config_input` and `command`; otherwise `explicit` and the process's own arguments.
            explicit: the options that were set in Python.
        """
        given = inputs.get("config_input") or "# set in Python\n" + dump_yaml(explicit)
        self.write_text("config.input.yaml", redact_text(given))
        self.write_text("config.yaml", dump_yaml(options))
        self.write_text("command.txt", redact_text(inputs.get("command") or shlex.join(sys.argv)) + "\n")

    def options(self) -> dict[str, Any] | None:
        """Return the options (`config.yaml`) that an earlier process of the run wrote here; None where none did.

        Raises:
            StorageError: they can't be read, or are missing beside checkpoints, which nothing can then be compared with.
        """
        if self.path is None:
            return None
        place = self.path / "config.yaml"
        if not place.exists():
            if any(self.path.glob("checkpoints/step-*")):
                problem = "the run has checkpoints, and the record of its options is missing"
                raise StorageError(problem, place=str(place), fix=_MEND)
            return None
        try:
            return load_yaml(place)[0]
        except ConfigError as error:
            got = error.problem if error.got is None else f"{error.problem}: {error.got}"
            problem = "can't be read as the record of the run's options"
            raise StorageError(problem, place=error.place, got=got, fix=_MEND) from None

    def read(self, name: str) -> Any:
        """Return a JSON file of the run, or None where it isn't there."""
        if self.path is None or not (self.path / name).exists():
            return None
        try:
            return read_json(self.path / name)
        except (OSError, ValueError) as error:
            raise StorageError("cannot read the run's record", place=str(self.path / name), got=error) from None

    def write(self, name: str, value: Any) -> None:
        """Put a JSON file in place."""
        if self.path is not None:
            self._write(name, value)

    def write_text(self, name: str, text: str) -> None:
        """Put a text file in place."""
        if self.path is not None:
            replace_file(self.path / name, text.encode())

    def close(self) -> None:
        """Let another process have the directory."""
        _release(self._lock)
        self._lock = None

    def _write(self, name: str, value: Any) -> None:
        assert self.path is not None
        replace_json(self.path / name, value)


def note_fault(path: Path, *, rank: int, code: int, step: int, message: str) -> None:
    """Tell launchers of a fault on another process than the first, which may not live to write it."""
    fault = {"status": "failed", "exit_code": code, "step": step, "message": f"process {rank}: {message}"}
    replace_json(path / "status.json", fault)


def _new_record() -> dict[str, Any]:
    return {"rlhf_core": __version__, "id": uuid.uuid4().hex, "started": _now(), "status": "running", "exit_code": None}


def _continued_record(path: Path) -> dict[str, Any]:
    """Return what a continued run keeps of its record, which `_is_run` has looked at."""
    old = read_json(path / "run.json")
    resumed, step = old.get("resumed"), old.get("step")
    return {
        "id": old["id"],
        "started": old["started"],
        "resumed": [*(resumed if isinstance(resumed, list) else []), _now()],
        "step": step if isinstance(step, int) else None,
    }


def _make_directory(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StorageError("is a file, not a directory", place=str(path), fix="choose another `output`")
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def _settle(path: Path, *, resume: bool, overwrite: bool) -> bool:
    """Make the directory fit for the run; return whether it continues an earlier one."""
    found = [item for item in path.iterdir() if item.name != _LOCK]
    leftovers = [item for item in found if _is_leftover(item.name)]
    content = [item for item in found if item not in leftovers]
    if not content:
        _remove(path, leftovers)
        return False
    ours = _is_run(path)
    # After a mistake that was found before the first step there is nothing to lose, and nothing to ask.
    overwrite = overwrite or (ours and not resume and _never_began(path))
    if not (resume or overwrite):
        fix = "`--resume` continues it, `--overwrite` replaces it" if ours else "choose an empty or a new directory"
        what = (
            "holds an earlier run"
            if ours
            else "is not empty, and not a run of ours (`--resume` and `--overwrite` need one)"
        )
        raise StorageError(what, place=str(path), fix=fix)
    if not ours:
        raise StorageError(
            "is not empty and not a run of ours, so it is neither continued nor removed",
            place=str(path),
            got=", ".join(sorted(item.name for item in content)[:5]),
            fix="choose an empty or a new directory",
        )
    # The mark of a run goes last: a kill half-way leaves something that can be overwritten again.
    _remove(path, leftovers + (sorted(content, key=lambda item: item.name == "run.json") if overwrite else []))
    return resume


def _is_leftover(name: str) -> bool:
    """Tell whether a killed run left a file of this name behind, of use to nobody."""
    of = leftover_of(name)
    return of is not None and (not of or _WRITTEN.fullmatch(of) is not None)


def _remove(path: Path, items: list[Path]) -> None:
    if items:
        with storage_errors(path):
            for item in items:
                remove_tree(item)
            fsync_directory(path)


def _is_run(path: Path) -> bool:
    """Tell whether a directory is a run's.

    Raises:
        StorageError: it holds the record of one, which can't be read.
    """
    place = path / "run.json"
    if not place.is_file():
        return False
    try:
        record = read_json(place)
        if not isinstance(record, dict) or not {"rlhf_core", "id", "started"} <= record.keys():
            raise ValueError("no record of a run")
    except (OSError, ValueError) as error:
        raise StorageError("can't be read as a run's record", place=str(place), got=error, fix=_MEND) from None
    return True


def _never_began(path: Path) -> bool:
    record = read_json(path / "run.json")
    logged = path / "metrics.jsonl"
    return (
        record.get("status") == "failed"
        and not record.get("step")
        and not (path / "checkpoints").exists()
        and not (logged.exists() and logged.stat().st_size)
    )


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
