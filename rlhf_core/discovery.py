"""Find plugins without importing them: entry points from installed metadata, headers from source text."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_core import API
from rlhf_core.errors import did_you_mean
from rlhf_core.header import Header, HeaderError, read_header, read_module_summary
from rlhf_core.records import RECORDS

GROUPS = {
    "trainer": "rlhf_core.trainers",
    "reward": "rlhf_core.rewards",
    "sampler": "rlhf_core.samplers",
    "merger": "rlhf_core.mergers",
    "hook": "rlhf_core.hooks",
}


@dataclass(frozen=True)
class Plugin:
    """One plugin, as it is listed.

    `status` is `ok`, `conflict` (another distribution offers the same name), `disabled`, `broken` or `wrong-api`; `reason` is
    empty where it is `ok`. `record` is the record type of a trainer's rows.
    """

    kind: str
    name: str
    qualified: str
    distribution: str
    version: str
    summary: str
    record: str | None
    api: int | None
    status: str
    reason: str
    target: str = field(repr=False)
    """What the entry point names: `package.module:Class`."""

    def as_dict(self) -> dict[str, Any]:
        """Return the public record, as `rlhf list --json` prints it."""
        names = ("kind", "name", "qualified", "distribution", "version", "summary", "record", "api", "status", "reason")
        return {name: getattr(self, name) for name in names}


def installed(kinds: Iterable[str]) -> dict[str, list[Plugin]]:
    """Return what the installed distributions offer of each kind, headers read; a name may stand several times."""
    groups = {GROUPS[kind]: kind for kind in kinds}
    seen: dict[str, dict[tuple[str, str], Plugin]] = {kind: {} for kind in groups.values()}
    origins: dict[int, tuple[str, str]] = {}
    for entry in _entry_points(groups):
        assert entry.dist is not None  # those found through distributions carry theirs
        # Each look at a distribution's name or version parses its metadata again.
        origin = origins.get(id(entry.dist)) or (entry.dist.name, entry.dist.version)
        origins[id(entry.dist)] = origin
        plugin = _read(groups[entry.group], entry.name, entry.value, *origin)
        seen[plugin.kind][plugin.qualified, plugin.target] = plugin
    return {kind: list(plugins.values()) for kind, plugins in seen.items()}


def _entry_points(groups: Iterable[str]) -> list[importlib.metadata.EntryPoint]:
    # The first distribution of a name on sys.path shadows later ones, as it does for imports.
    try:
        points = importlib.metadata.entry_points()
        return [entry for group in groups for entry in points.select(group=group)]
    except Exception:  # one malformed table must not hide every other distribution's; `rlhf doctor` names it
        found: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for distribution in importlib.metadata.distributions():
            with contextlib.suppress(Exception):
                found.setdefault(canonical(distribution.name), list(distribution.entry_points))
        return [entry for entries in found.values() for entry in entries if entry.group in groups]


def unreadable_distributions() -> list[tuple[str, str]]:
    """Return (place, reason) for each installed distribution whose metadata can't be read."""
    faults = []
    for distribution in importlib.metadata.distributions():
        try:
            canonical(distribution.name)
            list(distribution.entry_points)
        except Exception as error:
            place = str(getattr(distribution, "_path", distribution))
            faults.append((place, f"{type(error).__name__}: {error}"))
    return faults


def _read(kind: str, name: str, target: str, distribution: str, version: str) -> Plugin:
    qualified = f"{distribution}:{name}"
    plugin = Plugin(kind, name, qualified, distribution, version, "", None, None, "ok", "", target)
    try:
        if kind == "hook":
            return replace(plugin, summary=read_module_summary(target))
        header = read_header(target)
    except HeaderError as error:
        return replace(plugin, status="broken", reason=str(error))
    plugin = replace(plugin, summary=header.summary, record=header.record, api=header.api)
    status, reason = _header_fault(kind, header) or ("ok", "")
    return replace(plugin, status=status, reason=reason)


def _header_fault(kind: str, header: Header) -> tuple[str, str] | None:
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


def canonical(distribution: str) -> str:
    """Return a distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).casefold()
