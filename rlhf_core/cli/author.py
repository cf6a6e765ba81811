"""`rlhf new` and `rlhf check`: start a plugin of one's own and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_core.cli import shell_completion


def add_to(app: typer.Typer) -> None:
    # Whatever typer doesn't know is an option of the method.
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(check)
    app.command()(new)


def check(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="[KIND:]NAME", help="The plugin to check.", autocompletion=shell_completion.names)
    ],
) -> None:
    """Run the conformance tests of a plugin's kind against it: `rlhf check ties`, `rlhf check reward:reward_model --model M`.

    Any option of the method is a flag; those without a default must be given.
    """
    from rlhf_core import registry

    plugin = registry.lookup(name)
    method = registry.load(plugin)  # what can't be loaded is told in one line, not as failing tests
    from rlhf_core.config.base import BaseConfig
    from rlhf_core.config.flags import convert_options, lex
    from rlhf_core.config.yaml_file import nest
    from rlhf_core.testing.runner import run_contract

    kind = BaseConfig if plugin.kind == "hook" else method.Config
    given, places = convert_options(lex(context.args), kind, plugin.qualified, ())
    options = nest(given)
    kind.parse(options, place=places | {"": "command line"})  # what is missing is reported once, not by each test
    raise typer.Exit(run_contract(plugin.kind, plugin.qualified, options=options))


def new(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="trainer, reward, sampler, merger or hook.", autocompletion=shell_completion.kinds
        ),
    ],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the package and its plugin, such as acme-margin.")
    ],
    directory: Annotated[
        Path, typer.Option("--dir", help="Where to make the package's directory.", file_okay=False)
    ] = Path(),
    online: Annotated[
        bool,
        typer.Option(
            "--online", help="A trainer that learns from its own completions and their rewards, not from pairs."
        ),
    ] = False,
) -> None:
    """Write a package that offers one plugin: it installs, is listed and passes its tests as it is.

    A trainer learns from preference pairs, or with `--online` from what its policy generates.
    """
    from rlhf_core.cli.scaffold import write_package
    from rlhf_core.registry import parse_kind

    root = write_package(parse_kind(kind), name, directory, online=online)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        print(path)
    print(f"\nnext: pip install -e {root} && rlhf show {name} && pytest {root}/tests")
