"""Checkpoints that appear whole or not at all, and are checked before they are believed.

A save writes into a hidden directory, fsyncs each file, writes the manifest with every file's SHA-256 last, fsyncs the
directory, renames it into place, fsyncs the parent, and only then removes older ones. Tensors are safetensors, the rest is
JSON: loading runs no code.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_core.infra.errors import ModelError, shortened
from rlhf_core.infra.files import (
    FileRecord,
    fsync_directory,
    read_json,
    remove_tree,
    require_space,
    sha256_of,
    storage_errors,
    to_json,
    write_file,
)
from rlhf_core.infra.safetensors_file import nbytes, read_header, read_tensors, write_tensors

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"

_STEP = re.compile(r"^step-(0|[1-9]\d{0,11})$")
_FILE = re.compile(r"^[a-z][a-z0-9_]*\.(safetensors|json)$")
_MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has the hash that its manifest says."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a group of tensors by the name under which it was saved."""
        try:
            return read_tensors(self.path / f"{name}.safetensors")
        except (OSError, ValueError) as error:
            raise ModelError("cannot read the checkpoint", place=str(self.path), got=error) from None


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A checkpoint that was refused, where it was moved, and why."""

    step: int
    path: Path
    reason: str


class CheckpointManager:
    """Saves, finds and prunes the checkpoints of one run, `DIRECTORY/step-N/`.

    Args:
        directory: holds them; made when the first is saved.
        keep: how many are kept, at least two, so that there is one to fall back to.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}")
        self.directory, self.keep = Path(directory), keep
        self.protected: int | None = None
        """A step whose checkpoint is kept beside the newest."""
        self.damaged: list[DamagedCheckpoint] = []
        """What `load_latest` refused, newest first."""

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending; none is checked."""
        if not self.directory.is_dir():
            return []
        return sorted(int(match[1]) for path in self.directory.iterdir() if (match := _STEP.match(path.name)))

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Save groups of named tensors (`NAME.safetensors`) and JSON values (`state.json`); return the directory.

        Raises:
            StorageError: the disk is full or refuses; what was saved before is untouched.
        """
        text = to_json(dict(state))
        needed = sum(nbytes(group) for group in tensors.values()) + len(text)
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        require_space(self.directory, needed)
        final, temporary = self.path(step), self.directory / f".tmp-step-{step}"
        with storage_errors(final, needed):
            self._tidy()
            temporary.mkdir()
            try:
                self._write(temporary, step, tensors, text)
            except OSError:
                remove_tree(temporary)
                raise
            # Only a run that fell back behind a checkpoint saves a step twice; the earlier one makes way whole.
            if final.exists():
                final.rename(self._trash(step))
            temporary.rename(final)
            fsync_directory(self.directory)
            self._prune()
        return final

    def _write(self, temporary: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], text: bytes) -> None:
        records: dict[str, FileRecord] = {}
        for name, group in sorted(tensors.items()):
            records[f"{name}.safetensors"] = write_tensors(temporary / f"{name}.safetensors", group)
        records[STATE] = write_file(temporary / STATE, [text])
        files = {name: {"sha256": record.sha256, "bytes": record.bytes} for name, record in records.items()}
        write_file(temporary / MANIFEST, [to_json({"format": FORMAT, "step": step, "files": files})])
        fsync_directory(temporary)

    def _trash(self, step: int) -> Path:
        trash = self.directory / f".old-step-{step}"
        remove_tree(trash)
        return trash

    def _prune(self) -> None:
        for step in [step for step in self.steps()[: -self.keep] if step != self.protected]:
            # Out of sight in one rename first: a kill half-way through the removal must not leave half a checkpoint.
            trash = self._trash(step)
            self.path(step).rename(trash)
            remove_tree(trash)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what an earlier process left half written or half removed."""
        for path in self.directory.iterdir():
            if path.name.startswith((".tmp-step-", ".old-step-")):
                remove_tree(path)

    def load_latest(self, check: Callable[[Any], None] | None = None) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None where none was ever saved.

        A damaged one is renamed `step-N.damaged`, logged, and noted in `damaged`. `check` raises ValueError for a state that
        nothing can be made of.

        Raises:
            ModelError: there are checkpoints, and none is whole; each one's reason is given.
        """
        self.damaged = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self._verified(step)
                if check is not None:
                    check(checkpoint.state)
            except Exception as error:  # Whatever is wrong with its files, the one before may be whole.
                self.damaged.append(self._set_aside(step, _reason(error)))
                continue
            with storage_errors(self.directory):
                self._prune()  # A kill may have come between the rename and the removal of older ones.
            return checkpoint
        earlier = self._set_aside_before() if not self.damaged else []
        if self.damaged or earlier:
            reasons = [f"step {item.step}: {item.reason}" for item in self.damaged] or earlier
            raise ModelError(
                "no checkpoint is whole",
                place=str(self.directory),
                got=" | ".join(reasons),
                fix="start over with `--overwrite`, or put a whole checkpoint back",
            )
        return None

    def open(self, step: int) -> Checkpoint:
        """Return a checkpoint that another process has verified just now."""
        try:
            return Checkpoint(step, self.path(step), read_json(self.path(step) / STATE))
        except (OSError, ValueError) as error:
            raise ModelError("cannot read the checkpoint", place=str(self.path(step)), got=error) from None

    def verified(self, step: int) -> Checkpoint:
        """Return one checkpoint, checked.

        Raises:
            ModelError: it is damaged, or not there.
        """
        try:
            return self._verified(step)
        except (OSError, ValueError) as error:
            raise ModelError("the checkpoint is damaged", place=str(self.path(step)), got=_reason(error)) from None

    def _verified(self, step: int) -> Checkpoint:
        path = self.path(step)
        manifest = _read_manifest(path, step)
        for name, record in manifest.items():
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing")
            found = sha256_of(path / name)
            if found.bytes != record.bytes:
                raise ValueError(f"{name} has {found.bytes} bytes, not {record.bytes}")
            if found.sha256 != record.sha256:
                raise ValueError(f"{name} has another SHA-256 than when it was saved")
            if name.endswith(".safetensors"):
                read_header(path / name)
        return Checkpoint(step, path, read_json(path / STATE))

    def _set_aside(self, step: int, reason: str) -> DamagedCheckpoint:
        source = self.path(step)
        target, count = source.with_name(f"{source.name}.damaged"), 1
        while target.exists():
            count += 1
            target = source.with_name(f"{source.name}.damaged-{count}")
        with storage_errors(source):
            source.rename(target)
            fsync_directory(self.directory)
        log.warning(
            "checkpoint %s is damaged (%s); moved to %s, falling back to the one before", source, reason, target.name
        )
        return DamagedCheckpoint(step, target, reason)

    def _set_aside_before(self) -> list[str]:
        """Return the names of checkpoints that an earlier attempt moved aside."""
        if not self.directory.is_dir():
            return []
        return sorted(f"{path.name} was set aside" for path in self.directory.glob("step-*.damaged*"))


def _read_manifest(path: Path, step: int) -> dict[str, FileRecord]:
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    manifest = read_json(path / MANIFEST, _MAX_MANIFEST_BYTES)
    if not isinstance(manifest, dict) or manifest.keys() != {"format", "step", "files"}:
        raise ValueError(f"{MANIFEST} is malformed")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} has format {shortened(manifest['format'])}, not {FORMAT}")
    if manifest["step"] != step:
        raise ValueError(f"{MANIFEST} is of step {shortened(manifest['step'])}")
    if not isinstance(manifest["files"], dict):
        raise ValueError(f"{MANIFEST} is malformed at 'files'")
    records = {}
    for name, record in manifest["files"].items():
        if not _FILE.match(name) or not isinstance(record, dict) or record.keys() != {"sha256", "bytes"}:
            raise ValueError(f"{MANIFEST} is malformed at {shortened(name)}")
        if not isinstance(record["sha256"], str) or type(record["bytes"]) is not int:
            raise ValueError(f"{MANIFEST} is malformed at {shortened(name)}")
        records[name] = FileRecord(record["sha256"], record["bytes"])
    if STATE not in records:
        raise ValueError(f"{MANIFEST} lists no {STATE}")
    if to_json(manifest) != (path / MANIFEST).read_bytes():
        raise ValueError(f"{MANIFEST} is not as it was written")
    return records


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 300 else f"{text[:297]}..."
