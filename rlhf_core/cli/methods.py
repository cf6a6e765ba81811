"""`rlhf list`, `rlhf show` and `rlhf schema`: the installed methods, and the options of each."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_core.cli import METHOD_OPTIONS, shell_completion
from rlhf_core.cli.printing import print_json


def add_to(app: typer.Typer) -> None:
    app.command("list")(list_plugins)
    app.command(context_settings=METHOD_OPTIONS)(show)
    app.command()(schema)


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A method: NAME, KIND:NAME or DISTRIBUTION:NAME.", autocompletion=shell_completion.names
    ),
]


def list_plugins(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]", help="Only this kind, such as trainers.", autocompletion=shell_completion.kinds
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Import each method, in another process, and show whether that works.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Time limit of each import with --check; 60 by default."),
    ] = None,
) -> None:
    """List the installed methods with their status. Imports none of them, except with --check."""
    from rlhf_core.cli.listing import print_list

    print_list(kind, as_json=as_json, check=check, seconds=timeout)


def show(
    context: typer.Context,
    name: Name,
    every: Annotated[
        bool, typer.Option("--all", help="List all options, shared ones included; imports the method.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show one method: its origin, the record type that it reads, its own options. Imports it only with --all, or options.

    With options of the method, as in `rlhf show grpo --variant dapo`, it prints what those left open come to.
    """
    from rlhf_core.cli.listing import print_choices, print_plugin

    if context.args:
        print_choices(name, context.args, as_json=as_json)
    else:
        print_plugin(name, every=every, as_json=as_json)


def schema(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A method, or a kind of file: recipe, evaluate, test-capabilities.",
            autocompletion=shell_completion.names,
        ),
    ],
) -> None:
    """Print the JSON schema of a method's whole file: `method`, `model`, `data`, `output` and all of its options.

    Editors check and complete files by it; `rlhf init METHOD` writes one beside a file that names it. Of a reward it has the
    options alone.
    """
    from rlhf_core.cli.file_schemas import schema_of

    print_json(schema_of(name))
