"""`rlhf train` and `rlhf validate`: a method or a configuration file, with any option of the method as a flag."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from rlhf_core.cli import METHOD_OPTIONS, run_recipe, shell_completion
from rlhf_core.cli.data import print_mistakes
from rlhf_core.cli.first_argument import refuse_flag
from rlhf_core.cli.flag_wording import names_a_file, say_in_flags
from rlhf_core.cli.other_command import refuse_file_of_another
from rlhf_core.cli.printing import print_json, print_text
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.infra.errors import ConfigError, Interrupted, StorageError
from rlhf_core.infra.near_runs import near_run

if TYPE_CHECKING:
    from rlhf_core.contracts.result import TrainResult
    from rlhf_core.training.job import TrainingJob

Checked = TypeVar("Checked")

_SHOWN = 20
"""Lines of mistakes that are printed."""

log = logging.getLogger(__name__)

Target = Annotated[
    str,
    typer.Argument(
        metavar="METHOD_OR_FILE",
        help="A method's name or a configuration file, then any of its options.",
        autocompletion=shell_completion.trainers,
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(train)
    app.command(context_settings=METHOD_OPTIONS)(validate)


def train(
    context: typer.Context,
    target: Target,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check options and rows, print what the run takes; load and write nothing."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output from its last checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="With --resume: options that may differ from those of the run, by dotted names, such as learning_rate; may be"
            " repeated, or a list with commas.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model: `rlhf train dpo --model M --data D --output O --beta 0.2`, or `rlhf train CONFIG.yaml`.

    A configuration file is flat: method, model, data, eval_data, output and preset, then the method's options by name. Each is
    also a flag of that name (--learning_rate or --learning-rate, --lora.rank 8), which wins over the file; `rlhf train METHOD
    --help` lists them. Relative paths in a file are looked for in the working directory, then beside the
    file; `${NAME}` and `${NAME:-default}` in its values are environment variables.

    --resume with more --max_steps or --epochs makes a run longer, a finished one too; `rlhf train RUN_DIR --resume --max_steps
    2000` needs no other options.
    """
    if resume and overwrite:
        raise ConfigError("a run is either continued or replaced", place="--resume and --overwrite", fix="choose one")
    target, flags = _of_run(target, context.args, resume=resume)
    no_bars_in_logs()
    if dry_run:
        _refuse_flag(target)
        refuse_file_of_another(target, "train", checked=True)
        return _describe(target, flags, resume=resume, overwrite=overwrite)
    with quick_imports():
        job = _job(target, flags)
    if resume:
        _require_output(job)
    from rlhf_core.registry.plugin_logs import setup_logging

    setup_logging(rank=_rank())
    if _rank() == 0:
        _warn_of_broken()
    allowed = [name.strip() for names in allow_change or [] for name in names.split(",") if name.strip()]
    result = _run(job, resume=resume, overwrite=overwrite, allow_change=allowed)
    if _rank() == 0:
        _report(result, as_json=as_json)
        _refuse_unpushed(result, job)
    return None


def _rank() -> int:
    """Return this process's number among those of the run; the first one prints for all."""
    return int(os.environ.get("RANK", "0"))


def _run(job: TrainingJob, *, resume: bool, overwrite: bool, allow_change: list[str]) -> TrainResult:
    """Do a run to its end.

    Raises:
        Interrupted: by Ctrl-C, with what the run has saved.
    """
    from rlhf_core.training.run import run

    trainer = job.trainer(command=shlex.join(["rlhf", *sys.argv[1:]]))
    try:
        return run(trainer, resume=resume, overwrite=overwrite, allow_change=allow_change)
    except KeyboardInterrupt as error:
        # typer would exit without the notes, which say what the run has saved.
        interrupted = Interrupted("; ".join(["stopped by Ctrl-C", *getattr(error, "__notes__", [])]))
        interrupted.silent = _rank() > 0
        raise interrupted from error


def _refuse_unpushed(result: TrainResult, job: TrainingJob) -> None:
    """Raise where the model wasn't pushed: the run is whole, and recorded as done, but not all that was asked for was done."""
    if result.push_error is not None:
        raise StorageError(
            "the run is done and its model saved, and wasn't pushed",
            place="push_to_hub",
            got=result.push_error,
            fix=f"`rlhf push {result.output} {job.options.push_to_hub.repo}`",  # type: ignore[union-attr]
        )


def _of_run(target: str, flags: list[str], *, resume: bool) -> tuple[str, list[str]]:
    """Return what is to be trained where a run's directory is named: its own configuration, with itself as `--output`."""
    from rlhf_core.registry.method_or_file import names_file

    directory = Path(target).expanduser()
    if not (directory / "run.json").is_file() or not (directory / "config.yaml").is_file():
        a_run = names_file(target) and directory.suffix not in (".yaml", ".yml") and not directory.exists()
        if a_run and (near := near_run(directory)) is not None:
            raise ConfigError("no such file or run", place=target, fix=near)
        return target, flags
    if not resume:
        raise ConfigError(
            "is a run's directory",
            place=target,
            fix=f"`--resume` continues that run, with more `--max_steps` for longer; {directory / 'config.yaml'} has its options",
        )
    _refuse_objects(directory, target)
    return str(directory / "config.yaml"), ["--output", str(directory), *flags]


def _refuse_objects(directory: Path, target: str) -> None:
    """Refuse to continue a run whose model or data were objects in Python, which no file holds."""
    from rlhf_core.config.run_file import is_object
    from rlhf_core.config.yaml_file import load_yaml

    options, _ = load_yaml(directory / "config.yaml")
    given = [f"`{name}`" for name in ("model", "data", "eval_data") if is_object(options.get(name))]
    if given:
        raise ConfigError(
            f"the run was started in Python from objects, not from files: {', '.join(given)}",
            place=target,
            fix="continue it by `trainer.train(resume=True)` in the program that made them, or train its `model/` in a new run",
        )


def _warn_of_broken() -> None:
    """Warn of plugins that can't be used, though this run needs none of them; the run itself warns of hooks."""
    from rlhf_core import registry

    for plugin in registry.find():
        if plugin.status in ("broken", "wrong-api") and plugin.kind != "hook":
            log.warning("%s `%s` is %s, and left out: %s", plugin.kind, plugin.qualified, plugin.status, plugin.reason)


def validate(context: typer.Context, target: Target) -> None:
    """Check a file without running it: a method's options, completed or overridden by flags as for `train`, or a whole recipe.

    All mistakes are shown at once, a line each: of the options and of the rows, of which the first 10,000 of each file are read.
    Where there are none, it says how many steps, parameters, and how much memory and disk the run takes. Of a recipe (a file
    with `stages`) everything is checked, too, with the memory and time that its stages will take.
    """
    if _is_recipe(target):
        if context.args:
            raise ConfigError("a recipe is checked without flags", place="command line", got=f"`{context.args[0]}`")
        return run_recipe.check(target)
    _refuse_flag(target)
    refuse_file_of_another(target, "train", checked=True)
    job, lines = _forecast(target, context.args)
    print(f"ok: {target} is a valid configuration of {job.plugin.qualified}")
    for line in lines:
        print_text(line)
    return None


def _is_recipe(target: str) -> bool:
    """Tell whether a file is a pipeline's recipe."""
    from rlhf_core.config.yaml_file import load_yaml
    from rlhf_core.registry.method_or_file import names_file

    return names_file(target) and "stages" in load_yaml(target)[0]


def _job(target: str, flags: list[str]) -> TrainingJob:
    """Return the run that a method or file and flags configure."""
    from rlhf_core.registry.method_or_file import find_plugin, read_method_or_file

    _refuse_flag(target)
    refuse_file_of_another(target, "train")
    values, places, _ = read_method_or_file(target)
    find_plugin(values, places, "trainer")  # so that a mistyped name or file is answered before torch is imported
    from rlhf_core.training.job import load_job

    return load_job(target, flags=flags)


def _refuse_flag(target: str) -> None:
    """Refuse an option in the place of the method or file."""
    refuse_flag(target, "a method or a file", fix="`rlhf train METHOD --option value`")


def _describe(target: str, flags: list[str], *, resume: bool, overwrite: bool) -> None:
    """Print the resolved configuration as a valid file, headed by comments on what the run would read, take and write."""
    from rlhf_core.config.training import models_beside
    from rlhf_core.data.open_source import data_entries

    job, taken = _forecast(target, flags, resume=resume, overwrite=overwrite)
    if resume:
        _require_output(job)
    lines = [
        f"{job.plugin.qualified} {job.plugin.version}: {job.plugin.summary}".strip(),
        f"model: {_place(job.run.model)}",
        *(f"{name}: {_place(model.path)}" for name, model in models_beside(job.options).items()),
    ]
    for key in ("data", "eval_data"):
        given = job.run.model_dump()[key]
        for entry in [] if given is None else data_entries(given) or []:
            amounts = (("weight", entry.weight), ("share", entry.share), ("rows", entry.rows))
            used = "".join(f", {amount} {value:g}" for amount, value in amounts if value not in (1.0, None))
            kind = job.method.record_type(job.options)
            lines.append(f"{key}: {_place(str(entry.path))} (record type `{kind}`{used})")
    lines += taken
    print("\n".join(f"# {line}" for line in lines))
    print(job.to_yaml(), end="")


def _require_output(job: TrainingJob) -> None:
    """Raise where the run to continue isn't named."""
    if "output" not in job.places:
        raise ConfigError("no run to continue is named", place="--resume", fix="give `--output DIR`")


def _forecast(
    target: str, flags: list[str], *, resume: bool = False, overwrite: bool = False
) -> tuple[TrainingJob, list[str]]:
    """Return a run, and in lines what it would take and do with its directory; of one with mistakes print all, and exit.

    The exit code is 2 where the configuration has a mistake, else the lowest of theirs.
    """
    with quick_imports():
        from rlhf_core.training.job import check_job
        from rlhf_core.training.run_directory import output_state, refuse_inputs_inside
        from rlhf_core.training.run_forecast import forecast

        checked = check_job(target, flags=flags)
    found = forecast(checked)
    job, state = checked.job, ""
    if job is not None:
        output = Path(str(job.run.output))
        with found.mistakes.noted():
            state = output_state(output, resume=resume, overwrite=overwrite)
            if not resume:
                refuse_inputs_inside(output, job.resolved())
    if found.mistakes:
        if not names_a_file([target, *flags]):
            say_in_flags(found.mistakes.kept)
        print_mistakes(found.mistakes, _SHOWN, to_stderr=True)
        raise typer.Exit(min(error.exit_code for error in found.mistakes.kept))
    assert job is not None
    return job, [*found.lines(), f"output: {job.run.output} ({state})"]


def _place(name: str) -> str:
    """Return what a path or hub name is, in words."""
    path = Path(name).expanduser()
    if path.is_file():
        return f"file {path}, {path.stat().st_size:,} bytes"
    if path.is_dir():
        return f"directory {path}"
    return f"{name}, not a local path: would be fetched from the hub"


def _report(result: TrainResult, *, as_json: bool) -> None:
    """Print the result of a run."""
    from rlhf_core.training.run_summary import summary_lines

    if as_json:
        return print_json(vars(result))
    for line in summary_lines(result):
        print_text(line)
    return None
