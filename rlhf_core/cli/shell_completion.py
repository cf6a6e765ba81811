"""Names for shell completion. Nothing here may raise: a broken plugin must not break the user's Tab key."""

from __future__ import annotations


def kinds(incomplete: str) -> list[str]:
    from rlhf_core import registry

    return [kind for kind in registry.KINDS if kind.startswith(incomplete)]


def names(incomplete: str) -> list[tuple[str, str]]:
    """Every plugin's name with its summary."""
    return _names(None, incomplete)


def trainers(incomplete: str) -> list[tuple[str, str]]:
    """Every trainer's name with its summary, and the files that may be configurations."""
    return _names("trainer", incomplete) + _files(incomplete)


def mergers(incomplete: str) -> list[tuple[str, str]]:
    """Every merger's name with its summary, and the files that may be configurations."""
    return _names("merger", incomplete) + _files(incomplete)


def _files(incomplete: str) -> list[tuple[str, str]]:
    from pathlib import Path

    found = [str(path) for path in sorted(Path().glob("*.y*ml"))]
    return [(path, "configuration file") for path in found if path.startswith(incomplete)]


def _names(kind: str | None, incomplete: str) -> list[tuple[str, str]]:
    from rlhf_core import registry
    from rlhf_core.infra.errors import printable

    usable = [plugin for plugin in registry.find(kind) if plugin.status in ("ok", "conflict")]
    offers = [(p.name if p.status == "ok" else p.qualified, p.summary) for p in usable]
    return [(name, printable(summary)) for name, summary in offers if name.startswith(incomplete)]
