"""`rlhf list`, `rlhf show` and `rlhf schema`: which methods there are and what each takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_core.cli import complete
from rlhf_core.cli.output import print_json, print_table

if TYPE_CHECKING:
    from rlhf_core.header import Option
    from rlhf_core.registry import Plugin


def add_to(app: typer.Typer) -> None:
    app.command("list")(list_plugins)
    app.command()(show)
    app.command()(schema)


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A method: NAME, KIND:NAME or DISTRIBUTION:NAME.", autocompletion=complete.names
    ),
]


def list_plugins(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="Only this kind, such as trainers.", autocompletion=complete.kinds),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array of records.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Import each one, and show what that reveals.")] = False,
) -> None:
    """List the methods that are installed, with their status. Imports none of them."""
    from rlhf_core.cli.listing import print_list

    print_list(kind, as_json=as_json, check=check)


def show(
    name: Name,
    every: Annotated[
        bool, typer.Option("--all", help="List every option, those that all methods share too; imports the method.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show one method: where it comes from, the record type of its rows, its own options. Imports none of it, but with --all."""
    from rlhf_core import registry
    from rlhf_core.header import HeaderError, read_header, read_options

    plugin = registry.lookup(name)
    doc, source, options = plugin.summary, "", []
    try:
        if plugin.kind != "hook":
            header = read_header(plugin.target)
            doc, source, options = header.doc, f"{header.path}:{header.line}", read_options(plugin.target)
    except HeaderError:
        pass  # its status tells the reason, and it is shown all the same
    if as_json:
        return print_json(
            {**plugin.as_dict(), "doc": doc, "source": source, "options": [vars(option) for option in options]}
        )
    print(f"{plugin.name}: {doc.strip()}" if doc else plugin.name)
    print()
    facts = [
        ("kind", plugin.kind),
        ("qualified", plugin.qualified),
        ("version", plugin.version),
        ("target", plugin.target),
    ]
    facts += [("source", source), ("record", _record(plugin)), ("status", plugin.status), ("reason", plugin.reason)]
    width = max(len(label) for label, _ in facts)
    for label, value in facts:
        if value:
            print(f"{label:{width}}  {value}")
    if every:
        options = _every_option(plugin)
    if options:
        print()
        print_table(("option", "type", "default", "description"), [tuple(vars(option).values()) for option in options])
    if plugin.kind == "trainer" and not every:
        print(f"\nWith the options that all trainers share: rlhf show {name} --all")
    return None


def _every_option(plugin: Plugin) -> list[Option]:
    from rlhf_core import registry
    from rlhf_core.header import Option
    from rlhf_core.options import every_option

    config = getattr(registry.load(plugin), "Config", None)
    return [Option(*row[:4]) for row in every_option(config)] if config is not None else []


def schema(name: Name) -> None:
    """Print the JSON schema of a method's options."""
    from rlhf_core import registry

    cls = registry.load(registry.lookup(name))
    if not hasattr(cls, "Config"):
        from rlhf_core.errors import ConfigError

        raise ConfigError("a hook has no options", place=f"hook `{name}`", fix="name a method")
    print_json(cls.Config.model_json_schema())


def _record(plugin: Plugin) -> str:
    from rlhf_core.records import RECORDS

    record = RECORDS.get(plugin.record or "")
    return f"{record.name} ({', '.join(record.required)}): {record.summary}" if record else ""
