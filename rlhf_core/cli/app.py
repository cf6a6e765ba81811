"""The typer application of all verbs. Importing it imports neither torch nor pydantic, so that `--help` is fast."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated

import typer

from rlhf_core.cli import (
    INTERRUPTED,
    author,
    chat,
    compare_samplers,
    data,
    doctor,
    evaluate,
    find_flaws,
    fisher,
    init,
    merge,
    methods,
    publish,
    report,
    rollouts,
    run_recipe,
    runs,
    sample,
    samples,
    score,
    serve,
    test_capabilities,
    train,
)
from rlhf_core.infra.version import __version__

app = typer.Typer(
    name="rlhf",
    help="Post-training for language models in which every method is a plugin.",
    epilog="--debug and --no-plugins may be given anywhere on the command line. Exit codes: 2 configuration, 3 data,"
    " 4 model or checkpoint, 5 plugin, 6 numbers, 7 input/output or a lost process, 8 a regression in capability"
    " tests, 75 stopped and saved (Ctrl-C, SIGTERM), 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
methods.add_to(app)
init.add_to(app)
data.add_to(app)
train.add_to(app)
run_recipe.add_to(app)
chat.add_to(app)
sample.add_to(app)
compare_samplers.add_to(app)
samples.add_to(app)
rollouts.add_to(app)
report.add_to(app)
runs.add_to(app)
merge.add_to(app)
publish.add_to(app)
author.add_to(app)
score.add_to(app)
find_flaws.add_to(app)
evaluate.add_to(app)
fisher.add_to(app)
test_capabilities.add_to(app)
serve.add_to(app)
doctor.add_to(app)


def _paragraphs(text: str) -> str:
    """Return a docstring with each paragraph on one line, so that help is wrapped at the terminal's width alone."""
    return "\n\n".join(
        part if any(line.startswith((" ", "- ")) for line in part.splitlines()) else " ".join(part.split())
        for part in text.split("\n\n")
    )


for command in app.registered_commands:
    command.help = command.help or _paragraphs(inspect.getdoc(command.callback) or "")


def _version(value: bool) -> None:
    if value:
        print(f"rlhf-core {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Use rlhf-core's own methods only.")] = False,
) -> None:
    # `main` has removed `--debug` and `--no-plugins` from the arguments; they are declared here for `--help`.
    pass


def run(tokens: Sequence[str]) -> int:
    """Run one command and return its exit code; exceptions reach the caller."""
    code = typer.main.get_command(app).main(args=list(tokens), prog_name="rlhf", standalone_mode=False)
    if code == INTERRUPTED:  # what typer returns after Ctrl-C, without a message
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
