"""`rlhf doctor`: what is installed, what it runs on, and what is wrong with any plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlparse

import typer

from rlhf_core.cli.output import print_json, print_table
from rlhf_core.errors import PluginError, RLHFError

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    from rlhf_core.registry import Plugin


def add_to(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Check this installation: versions, device, entry points, and every plugin loaded once. Exit code 5 on a fault."""
    from rlhf_core import registry
    from rlhf_core.infra.devices import DeviceManager
    from rlhf_core.infra.environment import describe_environment

    about = describe_environment() | {"device": DeviceManager().describe()}
    plugins = [_loaded(plugin) for plugin in registry.find()]
    problems = find_problems() + [
        f"{p.kind} `{p.qualified}` is {p.status}: {p.reason}" for p in plugins if p.status not in ("ok", "disabled")
    ]
    if as_json:
        print_json({**about, "plugins": [plugin.as_dict() for plugin in plugins], "problems": problems})
    else:
        _print_environment(about)
        print()
        header = ("kind", "name", "distribution", "target", "status", "reason")
        print_table(header, [(p.kind, p.name, p.distribution, p.target, p.status, p.reason) for p in plugins])
        print("\nproblems:" if problems else "\nno problems")
        for problem in problems:
            print(f"- {problem}")
    if problems:
        raise typer.Exit(PluginError.exit_code)


def find_problems() -> list[str]:
    """Return what is wrong with installed metadata and the policy variables, a line each."""
    import importlib.metadata

    from rlhf_core.discovery import unreadable_distributions
    from rlhf_core.registry import unmatched_policy

    problems = [f"the metadata at {place} can't be read: {reason}" for place, reason in unreadable_distributions()]
    problems += [f"{variable} names `{entry}`, which matches no plugin" for variable, entry in unmatched_policy()]
    for distribution in importlib.metadata.distributions():
        problems += stale_entry_points(distribution)
    return problems


def stale_entry_points(distribution: Distribution) -> list[str]:
    """Compare an editable installation's entry points with its source's table: an installer reads the table only once."""
    from rlhf_core.discovery import GROUPS

    source = _editable_source(distribution)
    if source is None or not (source / "pyproject.toml").is_file():
        return []
    import tomllib

    try:
        project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        return [f"{source}/pyproject.toml can't be read: {error}"]
    if "entry-points" in project.get("dynamic", ()):
        return []
    table = project.get("entry-points", {})
    try:
        installed = list(distribution.entry_points)
    except Exception:  # told by `unreadable_distributions`
        return []
    problems = []
    for group in GROUPS.values():
        stated = {name: target.replace(" ", "") for name, target in table.get(group, {}).items()}
        there = {entry.name: entry.value.replace(" ", "") for entry in installed if entry.group == group}
        changed = sorted(name for name in stated.keys() | there.keys() if stated.get(name) != there.get(name))
        if changed:
            names = ", ".join(f"`{name}`" for name in changed)
            problems.append(
                f"{distribution.name}: {names} of {group} differ between {source}/pyproject.toml and what is installed;"
                f" fix: pip install -e {source}"
            )
    return problems


def _editable_source(distribution: Distribution) -> Path | None:
    text = distribution.read_text("direct_url.json")
    try:
        origin: dict[str, Any] = json.loads(text) if text else {}
    except ValueError:
        return None
    if not origin.get("dir_info", {}).get("editable") or not str(origin.get("url", "")).startswith("file:"):
        return None
    return Path(unquote(urlparse(origin["url"]).path))


def _loaded(plugin: Plugin) -> Plugin:
    """Load a plugin, guarded, and return it as the registry then lists it."""
    from rlhf_core import registry

    if plugin.status not in ("ok", "conflict"):
        return plugin
    try:
        registry.load(plugin)
    except RLHFError:
        same = [p for p in registry.find(plugin.kind) if (p.qualified, p.target) == (plugin.qualified, plugin.target)]
        return same[0]
    return plugin


def _print_environment(about: dict[str, Any]) -> None:
    device, build, machine = about["device"], about["torch_build"], about["machine"]
    for name, version in about["versions"].items():
        print(f"{name:14} {version}")
    accelerator = f"CUDA {build['cuda']}" if build["cuda"] else f"ROCm {build['hip']}" if build["hip"] else "CPU only"
    print(f"{'torch build':14} {accelerator}, git {str(build['git'])[:10]}")
    print(
        f"{'device':14} {device['name']}, {device['memory_bytes'] / 2**30:.1f} GiB, bf16 {'yes' if device['bf16'] else 'no'}"
    )
    print(f"{'threads':14} {about['threads']['intra_op']} in an operation, {about['threads']['inter_op']} between")
    print(f"{'machine':14} {machine['system']} {machine['release']} {machine['processor']}")
    print(f"{'python at':14} {about['executable']}")
