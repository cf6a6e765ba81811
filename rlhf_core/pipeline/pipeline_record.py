"""The record of a pipeline: `pipeline.json` (its state), `history.jsonl` (its events), the recipe, and the lock of the directory.

Every file but the history appears whole: a kill leaves the old or the new one.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_core.infra.environment import describe_environment
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.files import (
    append_lines,
    fsync_directory,
    is_locked,
    lies_in,
    lock_directory,
    read_json,
    remove_tree,
    replace_file,
    replace_json,
    storage_errors,
)
from rlhf_core.infra.version import __version__
from rlhf_core.pipeline.recipe import RecipeFile

StageStatus = Literal["waiting", "running", "finished", "failed", "rolled_back", "skipped", "stopped"]
PipelineStatus = Literal["running", "done", "stopped", "failed"]

_DIRECTORY = re.compile(r"stages/[A-Za-z0-9][A-Za-z0-9_-]*")
RECORD, HISTORY, LOCK = "pipeline.json", "history.jsonl", "pipeline.lock"


class PipelineRecord:
    """A pipeline's directory, locked by one process at a time.

    Args:
        path: the directory.
        values: the content of `pipeline.json`.
        lock: the open file that locks the directory.
    """

    def __init__(self, path: Path, values: dict[str, Any], lock: int | None) -> None:
        self.path, self.values, self._lock = path, values, lock

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> PipelineRecord:
        """Lock a directory and make it ready: an empty or missing one begins, `resume` continues, `overwrite` alone replaces.

        Raises:
            StorageError: it can't be written, isn't empty, isn't a pipeline's, or another process has locked it.
        """
        if path.exists() and not path.is_dir():
            raise StorageError("is a file, not a directory", place=str(path), fix="choose another `output`")
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        new = not (path / LOCK).exists()
        lock = lock_directory(path, LOCK, "running this pipeline")
        try:
            values = _continued(path, resume=resume, overwrite=overwrite)
        except BaseException:
            if new:
                remove_tree(path / LOCK)
            if lock is not None:
                os.close(lock)
            raise
        return cls(path, values, lock)

    def begin(self, recipe: RecipeFile) -> None:
        """Write the recipe, the versions, and that the pipeline runs."""
        continued = bool(self.values["stages"])
        self.write_recipe(recipe)
        self.update(
            status="running", exit_code=None, message=None, ended=None, seed=recipe.recipe.seed, model=recipe.recipe.model,
            resumed=[*self.values.get("resumed", []), *([now()] if continued else [])],
            versions=describe_environment().get("versions"),
        )  # fmt: skip
        names = [one.name for one in recipe.stages]
        self.event("pipeline_resumed" if continued else "pipeline_started", stages=names)

    def write_recipe(self, recipe: RecipeFile) -> None:
        """Write the recipe as it was given, and with every key; secrets redacted."""
        replace_file(self.path / "recipe.input.yaml", recipe.text.encode())
        replace_file(self.path / "recipe.yaml", recipe.to_yaml().encode())

    def update(self, **fields: Any) -> None:
        """Change fields of `pipeline.json`."""
        self.values |= fields
        replace_json(self.path / RECORD, self.values)

    def stage(self, name: str) -> dict[str, Any]:
        """Return what is recorded of a stage; nothing of one that is new."""
        return next((one for one in self.values["stages"] if one["name"] == name), {})

    def directories(self) -> dict[str, str]:
        """Return name → directory of the stages that were run before, relative to the pipeline's."""
        found = {one["name"]: one.get("directory") for one in self.values["stages"]}
        # What a stage has made may be removed, so a path that leads elsewhere isn't taken from a file.
        return {name: text for name, text in found.items() if isinstance(text, str) and _DIRECTORY.fullmatch(text)}

    def update_stage(self, name: str, **fields: Any) -> None:
        """Change fields of one stage."""
        found = self.stage(name)
        if not found:
            self.values["stages"].append(found := {"name": name})
        found |= fields
        self.update()

    def arrange(self, names: list[str], *, more: bool = False) -> None:
        """Put the stages into the recipe's order, without those that it has no more.

        Args:
            more: keep them: further stages may be added.
        """
        others = [one for one in self.values["stages"] if one["name"] not in names] if more else []
        self.values["stages"] = [self.stage(name) or {"name": name, "status": "waiting"} for name in names] + others

    def event(self, event: str, **fields: Any) -> None:
        """Append to the history."""
        line = json.dumps({"time": now(), "event": event, **fields}, ensure_ascii=False, default=str)
        append_lines(self.path / HISTORY, [line])

    def end(self, status: PipelineStatus, exit_code: int, message: str | None, policy: str | None) -> None:
        """Write how the pipeline ended."""
        self.update(status=status, exit_code=exit_code, message=message, policy=policy, ended=now())
        self.event(f"pipeline_{status}", exit_code=exit_code, message=message, policy=policy)

    def close(self) -> None:
        """Unlock the directory for another process."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def now() -> str:
    """Return the time as the records have it, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def output_state(path: Path, *, resume: bool, overwrite: bool) -> str:
    """Return what a pipeline would find in its directory and do with it, as a phrase; nothing is changed.

    Raises:
        StorageError: it is a file, holds what no pipeline has written, or a record that can't be read: neither option helps then.
    """
    if path.exists() and not path.is_dir():
        raise StorageError("is a file, not a directory", place=str(path), fix="choose another `output`")
    content = [item for item in path.iterdir() if item.name != LOCK] if path.exists() else []
    if not content:
        return "new"
    _read_record(path, content)
    if is_locked(path / LOCK):
        return "a pipeline is at work there: wait for its end, or choose another `output`"
    if resume:
        return "continued, and changed stages replaced" if overwrite else "continued"
    return "replaced" if overwrite else "holds an earlier pipeline: needs --resume or --overwrite"


def _continued(path: Path, *, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Return the content of `pipeline.json` to go on with, after removing what is replaced."""
    content = [item for item in path.iterdir() if item.name != LOCK]
    fresh = {"rlhf_core": __version__, "started": now(), "stages": []}
    if not content:
        return fresh
    values = _read_record(path, content)
    if resume:
        return values
    if not overwrite:
        fix = "`--resume` continues it, `--overwrite` replaces it"
        raise StorageError("holds an earlier pipeline", place=str(path), fix=fix)
    with storage_errors(path):
        # The record goes last: after a kill half-way the rest can be removed again.
        for item in sorted(content, key=lambda item: item.name == RECORD):
            remove_tree(item)
        fsync_directory(path)
    return fresh


def _read_record(path: Path, content: Sequence[Path]) -> dict[str, Any]:
    """Return the content of `pipeline.json` of a directory that isn't empty.

    Raises:
        StorageError: it holds none, or one that can't be read.
    """
    record = path / RECORD
    if not record.is_file():
        raise StorageError(
            "is not empty and not a pipeline's directory, so it is neither continued nor removed",
            place=str(path),
            got=", ".join(sorted(item.name for item in content)[:5]),
            fix="choose an empty or a new directory",
        )
    try:
        values = read_json(record)
        if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
            raise ValueError("no record of a pipeline")
    except (OSError, ValueError) as error:
        fix = "restore a whole copy of it, or choose a new directory"
        raise StorageError("can't be read as a pipeline's record", place=str(record), got=error, fix=fix) from None
    return values


def refuse_inputs_inside(path: Path, sources: dict[str, str]) -> None:
    """Raise `ConfigError` where the directory that `overwrite` would empty holds what the pipeline reads.

    Args:
        sources: path → where it was set.
    """
    directory = path.resolve()
    for source, place in sources.items():
        if lies_in(Path(source).expanduser(), directory):
            fix = "choose another `output`"
            raise ConfigError("lies in the directory that is replaced", place=place, got=source, fix=fix)
