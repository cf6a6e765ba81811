"""Find plugins without importing them: entry points from installed metadata, headers from source text.

What is installed is read once in a process and kept while the places on `sys.path` stay as they are; a source is read again
when its file changes.
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
    read_module_summary,
    split_target,
)
from rlhf_core.registry.distributions import GROUPS as GROUPS
from rlhf_core.registry.distributions import LOCAL as LOCAL
from rlhf_core.registry.distributions import EntryPoint, Scan, scan


@dataclass(frozen=True)
class Plugin:
    """One plugin, as it is listed.

    `status` is `ok`, `conflict` (another distribution offers the same name), `disabled`, `broken` or `wrong-api`; `reason` is
    empty where it is `ok`, unless the plugin has no source: then it says that summary, record, stage and api are known once it
    is loaded. `record` is the record type of a trainer's rows, `stage` where in the pipeline it stands.
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
    """What the entry point names: `package.module:Class`."""

    def as_dict(self) -> dict[str, Any]:
        """Return the public record, as `rlhf list --json` prints it."""
        return {name: getattr(self, name) for name in PUBLIC}

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from every other plugin, those that share its qualified name too."""
        return self.kind, self.qualified, self.target


PUBLIC = (
    "kind", "name", "qualified", "distribution", "version", "summary", "record", "stage", "api", "status", "reason",
)  # fmt: skip

MOST = 300
"""Characters of a summary that are listed."""
UNREAD = "it has no source to read; summary, record type, stage and api are known once it is loaded"

Stamp = tuple[str, int, int, int]

_scanned: tuple[object, Scan] | None = None
_read: dict[EntryPoint, tuple[Stamp, Plugin]] = {}


def installed() -> Scan:
    """Return what is installed, read again only where `sys.path`, or what stands in its places, has changed."""
    global _scanned
    if _scanned is None or _scanned[0] != _state(_scanned[1]):
        module_source.forget()
        found = scan()
        _scanned = (_state(found), found)
        _read.clear()
    return _scanned[1]


def forget() -> None:
    """Read everything again when it is next asked for."""
    global _scanned
    _scanned = None
    _read.clear()
    module_source.forget()


def read(offer: EntryPoint) -> Plugin:
    """Return the plugin that an entry point offers, its header read."""
    known = _read.get(offer)
    if known is not None and known[0] == _stamp(known[0][0]):
        return known[1]
    plugin, path = _plugin(offer)
    if path is not None:
        _read[offer] = (_stamp(str(path)), plugin)
    return plugin


def _state(found: Scan) -> object:
    places = [place or "." for place in sys.path if isinstance(place, str)]
    return [_stamp(place) for place in (*places, *found.tables)], [id(finder) for finder in sys.meta_path]


def _stamp(path: str) -> Stamp:
    try:
        about = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return path, 0, 0, 0
    return path, about.st_mtime_ns, about.st_size, about.st_ino


def _plugin(offer: EntryPoint) -> tuple[Plugin, Path | None]:
    """Return an offer as a plugin, and the file that says so."""
    plugin = Plugin(
        offer.kind, offer.name, offer.qualified, offer.distribution, offer.version, "", None, None, None, "ok", "", offer.target
    )  # fmt: skip
    if offer.fault:
        return replace(plugin, status="broken", reason=offer.fault), None
    try:
        module, name = split_target(offer.target)
        plugin = replace(plugin, target=f"{module}:{name}" if name else module)
        if offer.kind == "hook":
            return replace(plugin, summary=_brief(read_module_summary(offer.target))), None
        header = read_class_header(offer.target)
    except NoSourceError as unread:
        return replace(plugin, reason=printable(f"{UNREAD}: {unread}")), unread.path
    except SourceError as error:
        return replace(plugin, status="broken", reason=printable(str(error))), error.path
    status, reason = _header_fault(offer.kind, header) or ("ok", "")
    plugin = replace(
        plugin, summary=_brief(header.summary), record=header.record, stage=header.stage, api=header.api,
        status=status, reason=printable(reason),
    )  # fmt: skip
    return plugin, header.path


def _brief(summary: str) -> str:
    return summary if len(summary) <= MOST else f"{summary[:MOST]}…"


def _header_fault(kind: str, header: ClassHeader) -> tuple[str, str] | None:
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
    """Return a method's name as it is compared: case, `-` and `_` make no difference."""
    return name.strip().casefold().replace("-", "_")
