"""The run directory: the options of a run, what it was made from and how it went, in files that people and programs can read.

The first process alone writes there. Every file but the logs (`*.jsonl`) appears whole: a kill leaves the old or the new one.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_core.config.yaml_file import dump_yaml, load_yaml
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.files import (
    fsync_directory,
    is_locked,
    leftover_of,
    lies_in,
    lock_directory,
    read_json,
    remove_tree,
    replace_file,
    replace_json,
    storage_errors,
)
from rlhf_core.infra.redact import redact_text
from rlhf_core.infra.version import __version__

RunStatus = Literal["running", "done", "stopped", "failed"]

_LOCK = "run.lock"
_FIX = "restore a whole copy of it, or choose a new directory"
_WRITTEN = re.compile(
    r"(run|status|data|models)\.json|config(\.input)?\.yaml|command\.txt|(metrics|samples|rollouts)\.jsonl|report\.html"
    r"|reference\.safetensors|model(_\w+)?"
)
"""Matches the names in a run's directory that appear whole, of which a killed run may leave temporary files."""


class RunDirectory:
    """The directory of one run, locked by one process at a time; without a path nothing is written.

    Args:
        path: the directory, which `open` has made ready.
        record: the content of `run.json`.
        continued: whether an earlier process of the run has worked here.
        lock: the open file that locks the directory.
    """

    def __init__(
        self, path: Path | None, record: dict[str, Any], *, continued: bool = False, lock: int | None = None
    ) -> None:
        self.path, self.record, self.continued, self._lock = path, record, continued, lock
        self._before: dict[str, Any] = {}
        """`run.json` as an earlier process of the run left it."""

    @classmethod
    def open(
        cls, path: Path | None, *, resume: bool, overwrite: bool, asked: Mapping[str, Any] | None = None
    ) -> RunDirectory:
        """Lock a directory for a run and make it ready, before anything expensive is loaded.

        In an empty or missing directory a run starts, also with `resume`. `resume` continues the run in it; `overwrite` removes
        one first, and nothing but a run.

        Args:
            asked: fields of `run.json` that say what was asked for, by which one recognises a run that fails at its start.

        Raises:
            StorageError: it can't be written, isn't empty, isn't a run's directory, or another process has locked it.
            ConfigError: both options, or `resume` without a directory.
        """
        if resume and overwrite:
            raise ConfigError("a run is either continued or replaced", got="--resume and --overwrite", fix="choose one")
        record, before = {**_new_record(), **(asked or {})}, dict[str, Any]()
        if path is None:
            if resume or overwrite:
                raise ConfigError("no run directory is set", place="output", fix="set `output`")
            return cls(None, record)
        _make_directory(path)
        new = not (path / _LOCK).exists()
        lock = lock_directory(
            path, _LOCK, "working in this run directory"
        )  # which also shows whether it can be written
        try:
            continued = _make_ready(path, resume=resume, overwrite=overwrite)
            if continued:
                before = read_json(path / "run.json")
                record |= _continued_record(before)
        except BaseException:
            if new and not (path / "run.json").exists():
                remove_tree(path / _LOCK)  # a directory that isn't a run's is left as it was
            _release(lock)
            raise
        opened = cls(path, record, continued=continued, lock=lock)
        opened._before = before
        opened.update(status="running")
        return opened

    def update(self, **fields: Any) -> None:
        """Change fields of `run.json` and of `status.json`, a short one for launchers (status, exit code, step, message)."""
        self.record |= fields
        self.write("run.json", self.record)
        self._write_status()

    def end_refused(self, exit_code: int, message: str) -> None:
        """Write that the run wasn't resumed: into `status.json` alone, since the run is what it was before."""
        self.record |= {"status": "failed", "exit_code": exit_code, "message": message}
        self._write_status()
        self.write("run.json", self._before)

    def _write_status(self) -> None:
        short = {name: self.record.get(name) for name in ("status", "exit_code", "step", "message")}
        self.write("status.json", short)

    def end(
        self,
        status: RunStatus,
        exit_code: int,
        *,
        step: int,
        message: str | None = None,
        consequence: bool = False,
    ) -> None:
        """Write how the run ended.

        Args:
            consequence: whether the fault may follow from that of another process; if one has been recorded, that is kept.
        """
        noted = self.read("status.json") or {}
        if consequence and isinstance(noted, dict) and noted.get("status") == "failed":
            exit_code, message = noted["exit_code"], noted["message"]
        self.update(status=status, exit_code=exit_code, step=step, message=message, ended=_now())

    @staticmethod
    def fault_recorded(path: Path | None) -> bool:
        """Return whether a process of the run has recorded a fault in `status.json`."""
        try:
            noted = read_json(path / "status.json") if path is not None else None
        except (OSError, ValueError):
            return False
        return isinstance(noted, dict) and noted.get("status") == "failed"

    def write_inputs(self, options: Mapping[str, Any], inputs: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
        """Write `config.input.yaml` (the options as given), `config.yaml` (all options) and `command.txt`, secrets redacted.

        Args:
            options: every option with its value, in the shape of a configuration file.
            inputs: may hold `config_input`, the text of a configuration file, and `command`; else `explicit` and the process's
                own arguments are written.
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
                raise StorageError(problem, place=str(place), fix=_FIX)
            return None
        try:
            return load_yaml(place)[0]
        except ConfigError as error:
            got = error.problem if error.got is None else f"{error.problem}: {error.got}"
            problem = "can't be read as the record of the run's options"
            raise StorageError(problem, place=error.place, got=got, fix=_FIX) from None

    def read(self, name: str) -> Any:
        """Return the values of a JSON file in the directory; None where it doesn't exist."""
        if self.path is None or not (self.path / name).exists():
            return None
        try:
            return read_json(self.path / name)
        except (OSError, ValueError) as error:
            raise StorageError("cannot read the run's record", place=str(self.path / name), got=error) from None

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file, whole."""
        if self.path is not None:
            replace_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole."""
        if self.path is not None:
            replace_file(self.path / name, text.encode())

    def close(self) -> None:
        """Unlock the directory for another process."""
        _release(self._lock)
        self._lock = None


def refuse_inputs_inside(path: Path, options: Mapping[str, Any]) -> None:
    """Refuse a run that would replace the directory in which it finds its model, its data or whatever else it reads.

    Args:
        path: the run directory.
        options: every option with its value, in the shape of a configuration file.

    Raises:
        ConfigError: names the option.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    directory = path.resolve()

    def check(value: Any, place: str) -> None:
        if isinstance(value, Mapping):
            for name, each in value.items():
                check(each, f"{place}.{name}" if place else str(name))
        elif isinstance(value, list | tuple):
            for each in value:
                check(each, place)
        elif isinstance(value, str) and place != "output":
            try:
                inside = lies_in(Path(value).expanduser(), directory)
            except (OSError, ValueError, RuntimeError):  # a text that no path can be
                return
            if inside:
                raise ConfigError(
                    "lies in the run directory, whose content the run would remove",
                    place=place, got=value, fix="choose another `output`",
                )  # fmt: skip

    check(options, "")


def record_fault(path: Path, *, rank: int, code: int, step: int, message: str) -> None:
    """Write the fault of a process other than the first into `status.json`: the first may end before it can."""
    fault = {"status": "failed", "exit_code": code, "step": step, "message": f"process {rank}: {message}"}
    replace_json(path / "status.json", fault)


def _new_record() -> dict[str, Any]:
    """Return the first content of `run.json`."""
    return {"rlhf_core": __version__, "id": uuid.uuid4().hex, "started": _now(), "status": "running", "exit_code": None}


def _continued_record(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an earlier `run.json` that a continued run keeps; `is_run` has checked it."""
    resumed, step, choices, changes = (old.get(name) for name in ("resumed", "step", "choices", "changes"))
    return {
        "id": old["id"],
        "started": old["started"],
        "resumed": [*(resumed if isinstance(resumed, list) else []), _now()],
        "step": step if isinstance(step, int) else None,
        "choices": choices if isinstance(choices, dict) else {},
        "changes": [one for one in changes if isinstance(one, dict)] if isinstance(changes, list) else [],
    }


def _make_directory(path: Path) -> None:
    """Create the directory; refuse a file of that name."""
    if path.exists() and not path.is_dir():
        raise StorageError("is a file, not a directory", place=str(path), fix="choose another `output`")
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def _make_ready(path: Path, *, resume: bool, overwrite: bool) -> bool:
    """Remove leftovers and, with `overwrite`, an earlier run; return whether the run continues an earlier one."""
    found = [item for item in path.iterdir() if item.name != _LOCK]
    leftovers = [item for item in found if _is_leftover(item.name)]
    content = [item for item in found if item not in leftovers]
    if not content:
        _remove(path, leftovers)
        return False
    ours = is_run(path)
    # A run that failed before its first step holds nothing that could be lost, so it is replaced without `--overwrite`.
    overwrite = overwrite or (ours and not resume and _never_began(path))
    if not ours:
        raise _foreign(path, content)
    if not (resume or overwrite):
        fix = "`--resume` continues it, `--overwrite` replaces it"
        raise StorageError("holds an earlier run", place=str(path), fix=fix)
    # `run.json`, which makes it a run's directory, goes last: after a kill half-way it can be overwritten again.
    _remove(path, leftovers + (sorted(content, key=lambda item: item.name == "run.json") if overwrite else []))
    return resume


def _foreign(path: Path, content: Sequence[Path]) -> StorageError:
    """Return the error for a directory that holds what no run has written."""
    return StorageError(
        "is not empty and not a run's directory, so it is neither continued nor removed",
        place=str(path),
        got=", ".join(sorted(item.name for item in content)[:5]),
        fix="choose an empty or a new directory",
    )


def _is_leftover(name: str) -> bool:
    """Return whether a name is that of a temporary file, which only a killed run leaves behind."""
    of = leftover_of(name)
    return of is not None and (not of or _WRITTEN.fullmatch(of) is not None)


def _remove(path: Path, items: list[Path]) -> None:
    """Remove files and directories in a directory, in their order, and fsync it."""
    if items:
        with storage_errors(path):
            for item in items:
                remove_tree(item)
            fsync_directory(path)


def output_state(path: Path, *, resume: bool, overwrite: bool) -> str:
    """Return what a run would find in its directory and do with it, as a phrase; nothing is changed.

    Raises:
        StorageError: it is a file, or holds what no run has written or a record that can't be read: neither option helps then.
    """
    if path.exists() and not path.is_dir():
        raise StorageError("is a file, not a directory", place=str(path), fix="choose another `output`")
    found = (
        [item for item in path.iterdir() if item.name != _LOCK and not _is_leftover(item.name)] if path.exists() else []
    )
    if not found:
        return "new"
    if not is_run(path):
        raise _foreign(path, found)
    if is_at_work(path):
        return "a run is at work there: wait for its end, or choose another `output`"
    if resume or overwrite:
        return "continued" if resume else "replaced"
    if _never_began(path):
        return "a run that failed before its first step, replaced"
    return "holds an earlier run: needs --resume or --overwrite"


def is_run(path: Path) -> bool:
    """Return whether a directory is a run's: whether it holds `run.json`.

    Raises:
        StorageError: it does, and the file can't be read.
    """
    place = path / "run.json"
    if not place.is_file():
        return False
    try:
        record = read_json(place)
        if not isinstance(record, dict) or not {"rlhf_core", "id", "started"} <= record.keys():
            raise ValueError("no record of a run")
    except (OSError, ValueError) as error:
        raise StorageError("can't be read as a run's record", place=str(place), got=error, fix=_FIX) from None
    return True


def is_at_work(path: Path) -> bool | None:
    """Return whether a process works in a run directory now; None where that can't be known."""
    return is_locked(path / _LOCK)


def _never_began(path: Path) -> bool:
    """Return whether the run in a directory failed before its first step."""
    record = read_json(path / "run.json")
    logged = path / "metrics.jsonl"
    return (
        record.get("status") == "failed"
        and not record.get("step")
        and not (path / "checkpoints").exists()
        and not (logged.exists() and logged.stat().st_size)
    )


def _release(lock: int | None) -> None:
    """Close the open file that locks a directory."""
    if lock is not None:
        os.close(lock)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
