"""Find plugins without importing them: entry points from installed metadata, class headers from source text.

Installed distributions are scanned once per process, and again when a directory on `sys.path` changes; a source file is read
again when it changes.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_core.contracts.records import RECORDS
from rlhf_core.infra.errors import did_you_mean, printable
from rlhf_core.infra.version import API
from rlhf_core.registry import module_source
from rlhf_core.registry.class_header import (
    ClassHeader,
    NoSourceError,
    SourceError,
    read_class_header,
    read_function_summary,
    read_module_summary,
    split_target,
)
from rlhf_core.registry.distributions import GROUPS as GROUPS
from rlhf_core.registry.distributions import LOCAL as LOCAL
from rlhf_core.registry.distributions import WITHOUT_CLASS as WITHOUT_CLASS
from rlhf_core.registry.distributions import EntryPoint, Scan, distribution_finders, metadata_directories, scan


@dataclass(frozen=True)
class Plugin:
    """One plugin, as `rlhf list` shows it.

    `status` is `ok`, `conflict` (several distributions offer the name), `disabled`, `broken` or `wrong-api`, and `reason` says
    why. An `ok` plugin has no reason, unless its source can't be read: then summary, record, stage and api are known only once
    it is loaded. `record` is the record type that a trainer reads, `stage` its place in the pipeline.
    """

    kind: str
    name: str
    qualified: str
    distribution: str
    version: str
    summary: str
    record: str | None
    stage: str | None
    api: int | None
    status: str
    reason: str
    target: str = field(repr=False)
    """The entry point's value: `package.module:Class`."""

    def as_dict(self) -> dict[str, Any]:
        """Return the public record, as `rlhf list --json` prints it."""
        return {name: getattr(self, name) for name in PUBLIC}

    @property
    def key(self) -> tuple[str, str, str]:
        """Identify the plugin, also among several of one qualified name."""
        return self.kind, self.qualified, self.target


PUBLIC = (
    "kind", "name", "qualified", "distribution", "version", "summary", "record", "stage", "api", "status", "reason",
)  # fmt: skip

_SUMMARY_LENGTH = 300
"""Characters of a summary that are listed."""
_NO_SOURCE = "it has no source to read; summary, record type, stage and api are known once it is loaded"

FileState = tuple[str, int, int, int]
"""Path, modification time in nanoseconds, size and inode of a file or directory: one of them changes when it does."""

_scanned: tuple[object, Scan] | None = None
"""The last scan, after the state of what it read."""
_listed: dict[str, tuple[FileState, list[FileState]]] = {}
"""Each place on `sys.path` as it was last listed: its state, and the states of the metadata directories in it."""
_read: dict[EntryPoint, tuple[FileState, Plugin]] = {}
"""Plugins whose source was read, after the state of its file."""


def installed() -> Scan:
    """Return the scan of all installed distributions, made again only when one was added, removed or replaced."""
    global _scanned
    if _scanned is None or _scanned[0] != _state(_scanned[1]):
        module_source.forget()
        found = scan()
        _scanned = (_state(found), found)
        _read.clear()
    return _scanned[1]


def forget() -> None:
    """Drop the scan and all that was read of sources, so that the next look reads them again."""
    global _scanned
    _scanned = None
    _read.clear()
    module_source.forget()


def read_plugin(entry: EntryPoint) -> Plugin:
    """Return the plugin behind an entry point: read its class's header, or take what was read before of the same file."""
    known = _read.get(entry)
    if known is not None and known[0] == _file_state(known[0][0]):
        return known[1]
    plugin, path = _plugin_and_source(entry)
    if path is not None:
        _read[entry] = (_file_state(str(path)), plugin)
    return plugin


def _state(found: Scan) -> object:
    """Return what a scan depends on, for comparison: metadata directories, tables of entry points, finders of distributions.

    Other changes of `sys.path` and of directories on it, such as a run's output in the current directory, don't count.
    """
    listed = [_metadata_in(place or ".") for place in sys.path if isinstance(place, str)]
    return (
        [states for states in listed if states],
        list(map(_file_state, found.tables)),
        list(map(id, distribution_finders())),
    )


def _metadata_in(place: str) -> list[FileState]:
    """Return the states of the metadata directories in a place on `sys.path`; of an archive, its own state."""
    state = _file_state(place)
    known = _listed.get(place)
    if known is None or known[0] != state:
        inside = map(_file_state, metadata_directories(place)) if os.path.isdir(place) else [state] * (state[3] > 0)  # noqa: PTH112
        known = _listed[place] = (state, list(inside))
    return known[1]


def _file_state(path: str) -> FileState:
    try:
        about = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return path, 0, 0, 0
    return path, about.st_mtime_ns, about.st_size, about.st_ino


def _plugin_and_source(entry: EntryPoint) -> tuple[Plugin, Path | None]:
    """Return the plugin behind an entry point, with the status that its source shows, and the source's file."""
    plugin = Plugin(
        entry.kind, entry.name, entry.qualified, entry.distribution, entry.version, "", None, None, None, "ok", "", entry.target
    )  # fmt: skip
    if entry.fault:
        return replace(plugin, status="broken", reason=entry.fault), None
    try:
        module, name = split_target(entry.target)
        plugin = replace(plugin, target=f"{module}:{name}" if name else module)
        if entry.kind == "hook":
            return replace(plugin, summary=_shortened(read_module_summary(entry.target))), None
        if entry.kind == "part":
            return replace(plugin, summary=_shortened(read_function_summary(entry.target))), None
        header = read_class_header(entry.target)
    except NoSourceError as unread:
        return replace(plugin, reason=printable(f"{_NO_SOURCE}: {unread}")), unread.path
    except SourceError as error:
        return replace(plugin, status="broken", reason=printable(str(error))), error.path
    status, reason = _header_fault(entry.kind, header) or ("ok", "")
    plugin = replace(
        plugin, summary=_shortened(header.summary), record=header.record, stage=header.stage, api=header.api,
        status=status, reason=printable(reason),
    )  # fmt: skip
    return plugin, header.path


def _shortened(summary: str) -> str:
    return summary if len(summary) <= _SUMMARY_LENGTH else f"{summary[:_SUMMARY_LENGTH]}…"


def _header_fault(kind: str, header: ClassHeader) -> tuple[str, str] | None:
    """Return (status, reason) where a class's literals `api` and `record` keep it from being a plugin of its kind."""
    if header.api is None:
        return "wrong-api", f"its class body has no literal `api = {API}`"
    if header.api != API:
        return "wrong-api", f"written for api {header.api}, not {API}"
    if kind == "trainer" and header.record not in RECORDS:
        if header.record is None:
            return "broken", f"its class body has no literal `record`; use one of: {', '.join(sorted(RECORDS))}"
        return "broken", f"unknown record `{header.record}`; {did_you_mean(header.record, RECORDS)}"
    return None


def fold(name: str) -> str:
    """Return the form in which names of methods are compared: lower case, `_` for `-`."""
    return name.strip().casefold().replace("-", "_")
