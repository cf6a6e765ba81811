"""The list of plugins. Apart from typer, so that `rlhf list` is quicker than typer's own import."""

from __future__ import annotations

from rlhf_core import registry
from rlhf_core.cli.output import print_json, print_table
from rlhf_core.errors import RLHFError

_STYLES = {"ok": "", "conflict": "yellow", "disabled": "dim", "broken": "red", "wrong-api": "red"}


def print_list(kind: str | None = None, *, as_json: bool = False, check: bool = False) -> None:
    """Print the plugins of one kind, or of all; with `check` each is imported first, so that its status is the true one."""
    if check:
        _load_each(kind)
    plugins = registry.find(kind)
    if as_json:
        return print_json([plugin.as_dict() for plugin in plugins])
    rows = [
        (p.kind, p.name, f"{p.distribution} {p.version}".strip(), p.record or "", p.status, p.reason or p.summary)
        for p in plugins
    ]
    header = ("kind", "name", "distribution", "record", "status", "summary")
    return print_table(header, rows, styles=[_STYLES[plugin.status] for plugin in plugins])


def _load_each(kind: str | None) -> None:
    for plugin in registry.find(kind):
        if plugin.status in ("ok", "conflict"):
            try:
                registry.load(plugin)
            except RLHFError:
                continue  # the registry remembers the reason and lists it
