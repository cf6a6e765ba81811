"""The output of a merge while it is written: weight files of their full length, filled tensor by tensor.

They are in a directory beside the target, `.NAME.merging`, with a journal of the tensors that are safely on disk; the model's
directory is renamed to the target when it is whole. However a merge is killed, the target holds nothing or the whole model, and
the resumed merge writes the same bytes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.infra.errors import ConfigError, NumbersError, StorageError
from rlhf_core.infra.files import (
    fsync_directory,
    fsync_file,
    lock_directory,
    read_json,
    remove_tree,
    replace_json,
    require_space,
    storage_error,
    storage_errors,
)
from rlhf_core.merging.plan import Plan, PlannedTensor
from rlhf_core.merging.tensor_names import score_head_of

log = logging.getLogger(__name__)

_JOURNAL = "merge.journal"
_STATE = "merge.state"
_LOCK = "merge.lock"
_MODEL = "model"
_OLD = "replaced"
_REPLACED = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".yaml", ".yml", ".png", ""}
"""Kinds of files that a model's directory holds; with others in it, it isn't replaced."""
COMMIT_BYTES = 1 << 26
"""Bytes after which what was written is flushed and recorded, beside the merging: a killed merge loses little, and little is
left to flush at the end."""


class Output:
    """The directory of an unfinished merge, which one process at a time writes to.

    Args:
        target: where the merged model will be.
        plan: what is written.
        fingerprint: of the merge: one of another fingerprint isn't resumed.
        resume: continue what a killed merge wrote.
        overwrite: replace a model at the target.

    Raises:
        StorageError: the target is taken, too little disk is left, or another process merges into it.
        ConfigError: `resume` finds no unfinished merge, or another one.
    """

    def __init__(self, target: Path, plan: Plan, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        # Checked before the plan, too; another process may have merged into the target since.
        overwrite = require_free(target, resume=resume, overwrite=overwrite)
        self.target, self.work, self._plan = target, unfinished(target), plan
        self.path = self.work / _MODEL
        self.done: set[str] = set()
        """Names of the tensors that are safely on disk."""
        self._written: list[PlannedTensor] = []
        self._files: dict[str, int] = {}
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="merge-commit")
        self._commits: list[Future[None]] = []
        with storage_errors(self.work, plan.nbytes):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.work, _LOCK, "merging into it")
            try:
                if resume:
                    self._read_journal(fingerprint)
                else:
                    self._start({"fingerprint": fingerprint, "overwrite": overwrite})
                self._open_files(new=not resume)
            except BaseException:
                if resume:
                    self.close()
                else:
                    self.discard()
                raise

    def write(self, tensor: PlannedTensor, start: int, values: Tensor) -> None:
        """Write elements of a tensor from an offset on, in its type; called from several threads or processes."""
        stored = values.reshape(-1).to(tensor.dtype).cpu()
        if (
            tensor.merged
            and not math.isfinite(float(stored.sum(dtype=torch.float32)))
            and not bool(stored.isfinite().all())
        ):
            largest = float(values.abs().max())
            raise NumbersError(
                f"merging tensor `{tensor.name}` gave values that {str(tensor.dtype).removeprefix('torch.')} can't hold",
                got=f"{largest:g}",
                fix="lower the weights or the scale"
                + ("" if score_head_of(tensor.name) else ", or set `dtype` to `bf16` or `float32`"),
            )
        view = stored.view(torch.uint8).numpy().data
        offset = tensor.start + start * tensor.dtype.itemsize
        try:
            while len(view):
                written = os.pwrite(self._files[tensor.file], view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise storage_error(error, self.path / tensor.file, self._plan.nbytes) from error

    def finish(self, tensor: PlannedTensor) -> None:
        """Record that all of a tensor is written; every `COMMIT_BYTES`, start to flush what was written to disk."""
        self._written.append(tensor)
        if sum(one.nbytes for one in self._written) < COMMIT_BYTES:
            return
        batch, self._written = self._written, []
        self._commits.append(self._committer.submit(self._commit, batch))

    def flush(self) -> None:
        """Wait until all that was started to be flushed is on disk."""
        for commit in self._commits:
            commit.result()

    def leave_to_parent(self) -> None:
        """Release the lock in a forked process, so that it is free once the parent is gone."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def publish(self, write_side_files: Callable[[Path], None]) -> Path:
        """Move the whole model to the target, and return the target.

        Args:
            write_side_files: writes to the model's directory all that belongs beside the weights.
        """
        self.flush()
        self._commit(self._written)
        with storage_errors(self.path):
            write_side_files(self.path)
            for file in self.path.iterdir():
                if file.name not in self._files:
                    fsync_file(file)
            fsync_directory(self.path)
            if self.target.exists():
                self.target.rename(self.work / _OLD)
            self.path.rename(self.target)
            fsync_directory(self.target.parent)
            self.discard()
        return self.target

    def discard(self) -> None:
        """Remove the unfinished merge."""
        self._committer.shutdown(wait=True, cancel_futures=True)
        remove_tree(self.work)
        self.close()

    def close(self) -> None:
        """Close the files and release the directory for other processes; what was written can be resumed."""
        self._committer.shutdown(wait=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}
        self.leave_to_parent()

    def _start(self, state: dict[str, Any]) -> None:
        if (self.work / _STATE).is_file():
            log.warning("the unfinished merge into %s is started over; --resume would have continued it", self.target)
        for file in self.work.iterdir():
            if file.name != _LOCK:
                remove_tree(file)
        require_space(self.work, self._plan.nbytes)
        self.path.mkdir()
        replace_json(self.work / _STATE, state)

    def _read_journal(self, fingerprint: str) -> None:
        if _state(self.target).get("fingerprint") != fingerprint:
            raise ConfigError(
                "the unfinished merge is of other inputs or options",
                place=str(self.target),
                fix="give the same ones, or leave out --resume to start over",
            )
        if (self.work / _JOURNAL).is_file():
            # A line that a kill truncated has no end; its tensors are merged again.
            lines = (self.work / _JOURNAL).read_text(encoding="utf-8").split("\n")[:-1]
            self.done = {line for line in lines if line}

    def _open_files(self, *, new: bool) -> None:
        self.path.mkdir(exist_ok=True)
        for file in self._plan.files:
            path = self.path / file.name
            fresh = new or not path.is_file() or path.stat().st_size != file.size
            if fresh and self.done & {tensor.name for tensor in self._plan.tensors if tensor.file == file.name}:
                raise StorageError(
                    "a file of the unfinished merge is damaged", place=str(path), fix="leave out --resume"
                )
            self._files[file.name] = _allocate(path, file.size) if fresh else os.open(path, os.O_RDWR)
            os.pwrite(self._files[file.name], file.header, 0)  # a kill may have come before it was first written

    def _commit(self, batch: list[PlannedTensor]) -> None:
        """Flush the files of some tensors, then add their names to the journal: in this order a tensor in it is on disk."""
        with storage_errors(self.path, self._plan.nbytes):
            for name in {tensor.file for tensor in batch} or set(self._files):
                os.fsync(self._files[name])
            descriptor = os.open(self.work / _JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, "".join(f"{tensor.name}\n" for tensor in batch).encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def unfinished(target: Path) -> Path:
    """Return the directory of an unfinished merge into a target."""
    target = target.expanduser().resolve()  # `.` has no name
    return target.with_name(f".{target.name}.merging")


def require_free(target: Path, *, resume: bool, overwrite: bool) -> bool:
    """Check that a merge may start, or be resumed, at a target; return whether it replaces a model.

    A model that a killed merge was about to replace is restored first.

    Raises:
        StorageError: the target holds something that isn't to be replaced.
        ConfigError: there is nothing to resume.
    """
    work = unfinished(target)
    if (work / _OLD).is_dir() and not target.exists():
        (work / _OLD).rename(target)
    if resume:
        state = _state(target)
        if not state:
            raise ConfigError("there is no unfinished merge to go on with", place=str(target), fix="leave out --resume")
        if target.exists() and not (work / _MODEL).exists():
            remove_tree(work)  # killed after the last rename
            raise ConfigError("the merge is whole already", place=str(target), fix="leave out --resume")
        overwrite = bool(state.get("overwrite"))
    _require_replaceable(target, overwrite=overwrite)
    return overwrite


def _require_replaceable(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise StorageError("is a file, not a directory", place=str(target), fix="choose another output")
    content = sorted(target.iterdir()) if target.is_dir() else []
    if not content:
        return
    if not (target / "config.json").is_file():
        raise StorageError("is not empty, and no model", place=str(target), fix="choose an empty or a new directory")
    if not overwrite:
        fix = "`--overwrite`, in Python `overwrite=True`, replaces it"
        if _state(target):
            fix = f"`--resume` continues the unfinished merge that is to replace it; {fix}, from the beginning"
        raise StorageError("holds a model already", place=str(target), fix=fix)
    foreign = [path.name for path in content if path.is_dir() or path.suffix not in _REPLACED]
    if foreign:
        raise StorageError(
            "holds more than a model, and isn't replaced",
            place=str(target),
            got=", ".join(foreign[:5]),
            fix="choose an empty or a new directory",
        )


def _state(target: Path) -> dict[str, Any]:
    path = unfinished(target) / _STATE
    try:
        found = read_json(path) if path.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _allocate(path: Path, size: int) -> int:
    """Make a file of `size` bytes, and return its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o644)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)  # a full disk is reported now, not after an hour
    else:
        os.ftruncate(descriptor, size)
    return descriptor
