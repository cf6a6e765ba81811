"""Training checkpoints on disk: they appear whole or not at all, and every file is verified before it is used.

A save writes into a hidden directory, fsyncs each file, writes the manifest with every file's SHA-256 last, fsyncs the
directory, renames it to its name, fsyncs the parent, and only then removes older checkpoints. Tensors are in safetensors files,
everything else is JSON: loading runs no code.
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
"""The version of the layout of a checkpoint's directory."""
MANIFEST = "manifest.json"
"""The file with the SHA-256 and size of all others."""
STATE = "state.json"
"""The file with everything that isn't a tensor."""

_STEP = re.compile(r"^step-(0|[1-9]\d{0,11})$")
_FILE = re.compile(r"^[a-z][a-z0-9_]*\.(safetensors|json)$")
_MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files all have the SHA-256 that its manifest names."""

    step: int
    path: Path
    state: dict[str, Any]
    """The values of `state.json`."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a group of tensors by the name under which it was saved."""
        try:
            return read_tensors(self.path / f"{name}.safetensors")
        except (OSError, ValueError) as error:
            raise ModelError("cannot read the checkpoint", place=str(self.path), got=error) from None


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A checkpoint that was refused: its step, where its directory is now, and the reason."""

    step: int
    path: Path
    reason: str


class CheckpointManager:
    """Saves, finds and removes the checkpoints of one run, in `DIRECTORY/step-N/`.

    Args:
        directory: where they are; created when the first is saved.
        keep: how many of the newest are kept; at least two, so that there is one to fall back to.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}")
        self.directory, self.keep = Path(directory), keep
        self.protected: int | None = None
        """A step whose checkpoint is kept in addition to the newest."""
        self.damaged: list[DamagedCheckpoint] = []
        """What `load_latest` refused, newest first."""

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending, whole or not."""
        if not self.directory.is_dir():
            return []
        return sorted(int(match[1]) for path in self.directory.iterdir() if (match := _STEP.match(path.name)))

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint, whether it exists or not."""
        return self.directory / f"step-{step}"

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Save groups of named tensors (`NAME.safetensors`) and JSON values (`state.json`); return the directory.

        Raises:
            StorageError: the disk is full, or can't be written; earlier checkpoints are as they were.
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
            # A run that fell back to an older checkpoint saves a step twice. The earlier directory is renamed whole.
            if final.exists():
                final.rename(self._trash(step))
            temporary.rename(final)
            fsync_directory(self.directory)
            self._prune()
        return final

    def _write(self, temporary: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], text: bytes) -> None:
        """Write and fsync the files of a checkpoint into a directory, the manifest last."""
        records: dict[str, FileRecord] = {}
        for name, group in sorted(tensors.items()):
            records[f"{name}.safetensors"] = write_tensors(temporary / f"{name}.safetensors", group)
        records[STATE] = write_file(temporary / STATE, [text])
        files = {name: {"sha256": record.sha256, "bytes": record.bytes} for name, record in records.items()}
        write_file(temporary / MANIFEST, [to_json({"format": FORMAT, "step": step, "files": files})])
        fsync_directory(temporary)

    def _trash(self, step: int) -> Path:
        """Return a hidden path to which a step's checkpoint can be renamed before it is removed."""
        trash = self.directory / f".old-step-{step}"
        remove_tree(trash)
        return trash

    def _prune(self) -> None:
        """Remove all checkpoints but the newest `keep` and the protected one."""
        for step in [step for step in self.steps()[: -self.keep] if step != self.protected]:
            # Renamed first: a kill during the removal must not leave half a checkpoint under a valid name.
            trash = self._trash(step)
            self.path(step).rename(trash)
            remove_tree(trash)
        self._tidy()

    def _tidy(self) -> None:
        """Remove hidden directories that a killed process left half written or half removed."""
        for path in self.directory.iterdir():
            if path.name.startswith((".tmp-step-", ".old-step-")):
                remove_tree(path)

    def load_latest(
        self, check: Callable[[Any], None] | None = None, fits: Callable[[Any], bool] | None = None
    ) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None where none was ever saved.

        Damaged ones are renamed `step-N.damaged`, logged, and listed in `damaged`.

        Args:
            check: called with the values of `state.json`; raises ValueError where a run can't be restored from them.
            fits: called with them after that; returns False for the end of a shorter run, before which a longer one continues.

        Raises:
            ModelError: there are checkpoints, and none is whole and fits; the reason for each is given.
        """
        self.damaged = []
        unfit: list[int] = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self._verified(step)
                if check is not None:
                    check(checkpoint.state)
            except Exception as error:  # Whatever is wrong with its files, the checkpoint before it may be whole.
                self.damaged.append(self._set_aside(step, _reason(error)))
                continue
            if fits is not None and not fits(checkpoint.state):
                unfit.append(step)
                continue
            if unfit:
                log.info(
                    "step %d was the end of a shorter run, inside a rollout or after a smaller batch: continuing from step %d",
                    unfit[0],
                    step,
                )
            with storage_errors(self.directory):
                self._prune()  # A kill may have come between the rename and the removal of older ones.
            return checkpoint
        if unfit:
            raise ModelError(
                "there is no checkpoint from which a longer run could continue",
                place=str(self.directory),
                got=f"step {unfit[0]} ends inside a rollout, or with a smaller batch of the rows that were left",
                fix="start over with `--overwrite`, or leave the run's length as it was",
            )
        earlier = self._earlier_damaged() if not self.damaged else []
        if self.damaged or earlier:
            reasons = [f"step {item.step}: {item.reason}" for item in self.damaged] or earlier
            raise ModelError(
                "no checkpoint is whole",
                place=str(self.directory),
                got=" | ".join(reasons),
                fix="start over with `--overwrite`, or restore a whole checkpoint from a copy",
            )
        return None

    def open(self, step: int) -> Checkpoint:
        """Return a step's checkpoint without verifying it: another process of the run just has."""
        try:
            return Checkpoint(step, self.path(step), read_json(self.path(step) / STATE))
        except (OSError, ValueError) as error:
            raise ModelError("cannot read the checkpoint", place=str(self.path(step)), got=error) from None

    def verified(self, step: int) -> Checkpoint:
        """Return a step's checkpoint, verified.

        Raises:
            ModelError: it is damaged, or doesn't exist.
        """
        try:
            return self._verified(step)
        except (OSError, ValueError) as error:
            raise ModelError("the checkpoint is damaged", place=str(self.path(step)), got=_reason(error)) from None

    def _verified(self, step: int) -> Checkpoint:
        """Return a step's checkpoint; raise ValueError or OSError unless every file has the size and hash in its manifest."""
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
        """Rename a damaged checkpoint `step-N.damaged`, and log that."""
        source = self.path(step)
        target, count = source.with_name(f"{source.name}.damaged"), 1
        while target.exists():
            count += 1
            target = source.with_name(f"{source.name}.damaged-{count}")
        with storage_errors(source):
            source.rename(target)
            fsync_directory(self.directory)
        log.warning(
            "checkpoint %s is damaged (%s); moved to %s, falling back to the checkpoint before it",
            source,
            reason,
            target.name,
        )
        return DamagedCheckpoint(step, target, reason)

    def _earlier_damaged(self) -> list[str]:
        """Return a text for each checkpoint that an earlier resume renamed as damaged."""
        if not self.directory.is_dir():
            return []
        return sorted(f"{path.name} was found damaged before" for path in self.directory.glob("step-*.damaged*"))


def _read_manifest(path: Path, step: int) -> dict[str, FileRecord]:
    """Return hash and size of each file by name, from the manifest in a checkpoint's directory; raise ValueError if malformed."""
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
    """Return why a checkpoint can't be used, in one line."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 300 else f"{text[:297]}..."
