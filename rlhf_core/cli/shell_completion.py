"""Shell completion of kinds and methods' names. It uses no plugin's code, so that a broken one can't break the Tab key."""

from __future__ import annotations


def kinds(incomplete: str) -> list[str]:
    """Return the kinds of plugins that begin with what was typed."""
    from rlhf_core import registry

    return [kind for kind in registry.KINDS if kind.startswith(incomplete)]


def names(incomplete: str) -> list[tuple[str, str]]:
    """Return (name, summary) of the plugins whose names begin with what was typed."""
    return _names(None, incomplete)


def trainers(incomplete: str) -> list[tuple[str, str]]:
    """Return (name, summary) of trainers that begin with what was typed, and of YAML files in the current directory."""
    return _names("trainer", incomplete) + _files(incomplete)


def mergers(incomplete: str) -> list[tuple[str, str]]:
    """Return (name, summary) of mergers that begin with what was typed, and of YAML files in the current directory."""
    return _names("merger", incomplete) + _files(incomplete)


def samplers(incomplete: str) -> list[tuple[str, str]]:
    """Return (name, summary) of samplers that begin with what was typed, and of YAML files in the current directory."""
    return _names("sampler", incomplete) + _files(incomplete)


def rewards(incomplete: str) -> list[tuple[str, str]]:
    """Return (name, summary) of rewards that begin with what was typed."""
    return _names("reward", incomplete)


def _files(incomplete: str) -> list[tuple[str, str]]:
    from pathlib import Path

    found = [str(path) for path in sorted(Path().glob("*.y*ml"))]
    return [(path, "configuration file") for path in found if path.startswith(incomplete)]


def _names(kind: str | None, incomplete: str) -> list[tuple[str, str]]:
    """Return (name, summary) of usable plugins that begin with what was typed; conflicting ones by qualified name."""
    from rlhf_core import registry
    from rlhf_core.infra.errors import printable

    usable = [plugin for plugin in registry.find(kind) if plugin.status in ("ok", "conflict")]
    offers = [(p.name if p.status == "ok" else p.qualified, p.summary) for p in usable]
    return [(name, printable(summary)) for name, summary in offers if name.startswith(incomplete)]
