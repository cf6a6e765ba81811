"""`rlhf new` and `rlhf check`: start a plugin of one's own and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_core.cli import complete


def add_to(app: typer.Typer) -> None:
    app.command()(check)
    app.command()(new)


def check(
    name: Annotated[
        str, typer.Argument(metavar="[KIND:]NAME", help="The method to check.", autocompletion=complete.names)
    ],
) -> None:
    """Run the conformance tests of a method's kind against it."""
    from rlhf_core import registry

    plugin = registry.lookup(name)
    registry.load(plugin)  # what can't be loaded is told in one line, not as failing tests
    from rlhf_core.testing.check import run_contract

    raise typer.Exit(run_contract(plugin.kind, plugin.qualified))


def new(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="trainer, reward, sampler or merger.", autocompletion=complete.kinds)
    ],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the package and its method, such as acme-margin.")
    ],
    directory: Annotated[
        Path, typer.Option("--dir", help="Where to make the package's directory.", file_okay=False)
    ] = Path(),
) -> None:
    """Write a package that offers one method: it installs, is listed and passes its tests as it is."""
    from rlhf_core.cli.scaffold import write_package
    from rlhf_core.registry import parse_kind

    root = write_package(parse_kind(kind), name, directory)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        print(path)
    print(f"\nnext: pip install -e {root} && rlhf show {name} && pytest {root}/tests")
