"""`rlhf doctor`: versions, device and machine, every plugin imported once, and what is wrong with the installation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli.printing import print_json, print_table, print_text, text_width
from rlhf_core.infra.errors import PluginError, describe_error

if TYPE_CHECKING:
    from rlhf_core import registry
    from rlhf_core.registry.distributions import InstalledDistribution


def add_to(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Check this installation: versions, device, and every plugin, imported once. Exit code 5 where there are problems."""
    from rlhf_core import registry
    from rlhf_core.infra.devices import DeviceManager
    from rlhf_core.infra.environment import describe_environment

    about = describe_environment() | {"device": DeviceManager().describe()}
    plugins = registry.check()
    problems = find_problems() + [
        f"{p.kind} `{p.qualified}` is {p.status}: {p.reason}" for p in plugins if p.status not in ("ok", "disabled")
    ]
    if as_json:
        print_json({**about, "plugins": [plugin.as_dict() for plugin in plugins], "problems": problems})
    else:
        _print_environment(about)
        print()
        _print_plugins(plugins)
        print("\nproblems:" if problems else "\nno problems")
        for problem in problems:
            print_text(f"- {problem}")
    if problems:
        raise typer.Exit(PluginError.exit_code)


def find_problems() -> list[str]:
    """Return what is wrong with installed metadata and the two policy variables of the registry, a line each."""
    from rlhf_core.registry import faults, unmatched_policy
    from rlhf_core.registry.distributions import every_distribution, unreadable_distributions

    unreadable = [f"the metadata at {place} can't be read: {reason}" for place, reason in unreadable_distributions()]
    problems = list(dict.fromkeys([*unreadable, *faults()]))
    problems += [f"{variable} names `{entry}`, which matches no plugin" for variable, entry in unmatched_policy()]
    for distribution in every_distribution([]):
        problems += stale_entry_points(distribution)
    return problems


def stale_entry_points(distribution: InstalledDistribution) -> list[str]:
    """Return the entry points of an editable installation that its pyproject.toml changed since it was installed, a line each."""
    from rlhf_core.registry.distributions import GROUPS

    source = Path(distribution.editable_source or "")
    if not source.is_absolute() or not (source / "pyproject.toml").is_file():
        return []
    import tomllib

    try:
        project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
        if "entry-points" in project.get("dynamic", ()):
            return []
        table = {group: dict(project.get("entry-points", {}).get(group, {})) for group in GROUPS.values()}
        stated_name = str(project.get("name", source.name))
    except Exception as error:  # of TOML, or of tables of another form
        return [f"{source}/pyproject.toml can't be read: {describe_error(error)}"]
    problems = []
    for group in GROUPS.values():
        stated = {name: str(target).replace(" ", "") for name, target in table[group].items()}
        there = {name: target.replace(" ", "") for name, target in distribution.targets(group).items()}
        changed = sorted(name for name in stated.keys() | there.keys() if stated.get(name) != there.get(name))
        if changed:
            names = ", ".join(f"`{name}`" for name in changed)
            problems.append(
                f"{stated_name}: {names} of {group} differ between {source}/pyproject.toml and what is installed;"
                f" fix: pip install -e {source}"
            )
    return problems


def _print_plugins(plugins: Sequence[registry.Plugin]) -> None:
    """Print a line per plugin, without the targets, whose names can't be broken, where a terminal is too narrow for them."""
    columns = ["kind", "name", "distribution", "target", "status", "reason"]
    rows = [[str(getattr(plugin, column)) for column in columns] for plugin in plugins]
    names = [max(map(len, column)) for column in zip(columns, *rows, strict=True)][:-1]
    if sum(names) + 2 * len(names) + 20 > text_width():
        columns.remove("target")
        rows = [row[:3] + row[4:] for row in rows]
    print_table(columns, rows)


def _print_environment(about: dict[str, Any]) -> None:
    """Print versions, device and machine, one line each."""
    device, build, machine = about["device"], about["torch_build"], about["machine"]
    for name, version in about["versions"].items():
        print(f"{name:14} {version}")
    accelerator = f"CUDA {build['cuda']}" if build["cuda"] else f"ROCm {build['hip']}" if build["hip"] else "CPU only"
    print(f"{'torch build':14} {accelerator}, git {str(build['git'])[:10]}")
    print(
        f"{'device':14} {device['name']}, {device['memory_bytes'] / 2**30:.1f} GiB, bf16 {'yes' if device['bf16'] else 'no'}"
    )
    print(
        f"{'threads':14} {about['threads']['intra_op']} within an operation, {about['threads']['inter_op']} between operations"
    )
    print(f"{'machine':14} {machine['system']} {machine['release']} {machine['processor']}")
    print(f"{'python at':14} {about['executable']}")
