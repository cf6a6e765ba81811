"""`rlhf merge`: several models into one, by a method or a file; `--diff` compares two instead."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli import METHOD_OPTIONS, shell_completion
from rlhf_core.cli.first_argument import refuse_flag
from rlhf_core.cli.other_command import refuse_file_of_another
from rlhf_core.cli.printing import print_json, print_text
from rlhf_core.cli.quick_imports import quick_imports
from rlhf_core.cli.weight_diff import show_difference
from rlhf_core.infra.errors import ConfigError, Interrupted, ModelError
from rlhf_core.infra.files import readable_size

if TYPE_CHECKING:
    from rlhf_core.merging.job import MergeJob
    from rlhf_core.merging.merge import MergeResult, ModelMerger

log = logging.getLogger(__name__)

_Target = Annotated[
    str | None,
    typer.Argument(
        metavar="METHOD_OR_FILE",
        help="A method's name or a configuration file, ours or mergekit's, then any of its options; or an adapter to fold.",
        show_default=False,
        autocompletion=shell_completion.mergers,
    ),
]
_Evaluate = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="FILE.py:FUNCTION",
        help="Function that takes a model's directory and returns its score, larger being better: for greedy_soup.",
    ),
]
_Diff = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--diff", metavar="A B", help="Show the distance between the weights of two models, instead of merging."
    ),
]
_Picture = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE.png", help="Draw what --diff finds into a file.")
]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(merge)


def merge(
    context: typer.Context,
    target: _Target = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the resolved configuration; write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the merge into --output that was stopped or killed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    evaluate: _Evaluate = None,
    diff: _Diff = None,
    picture: _Picture = None,
) -> None:
    """Merge: `rlhf merge ties --base B --model A=0.7 --model C=0.3 --output O --density 0.2`, or `rlhf merge CONFIG.yaml`.

    --model PATH[=WEIGHT] names an input model and is repeated for each; --base names the base model, from which task vectors are
    taken. A configuration file is flat: method, base, models (each a name, or a group of model, weight and options for it alone),
    output, then the method's options by name. Each is also a flag, which wins over the file, those of one model as
    `--models.0.density 0.5`; so are dtype, tokenizer, shard_size, threads, device, seed, hash_inputs, and `--compat mergekit`,
    which chooses mergekit's definition of a method. `rlhf show METHOD` lists a method's options. Files of mergekit are read
    unchanged. --resume continues a merge that was killed.

    `rlhf merge ADAPTER --output O` folds an adapter, or that of a run, into its base; `BASE+ADAPTER` names another base.

    `rlhf merge --diff A B` shows the distance between the weights of two models, by layer.
    """
    if diff is not None:
        if unexpected := [*filter(None, [target]), *context.args]:
            fix = "`rlhf merge --diff A B [--picture FILE.png]`"
            raise ConfigError("unexpected argument", place="--diff", got=f"`{unexpected[0]}`", fix=fix)
        return show_difference(*diff, picture=picture, as_json=as_json)
    method_or_file = _checked(target, picture=picture, resume=resume, overwrite=overwrite)
    with quick_imports():
        from rlhf_core.merging.job import load_merge_job
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
        flags = list(context.args)
        refuse_file_of_another(method_or_file, "merge", checked=dry_run)
        if (adapter := _adapter_at(method_or_file)) is not None:
            method_or_file, flags = "passthrough", ["--model", adapter, *flags]
        job = load_merge_job(method_or_file, flags=flags)
    if dry_run:
        return _describe(job, resume=resume, overwrite=overwrite, as_json=as_json)
    result = _merge(job, evaluate, resume=resume, overwrite=overwrite)
    return _report(result, as_json=as_json)


def _checked(target: str | None, *, picture: Path | None, resume: bool, overwrite: bool) -> str:
    """Return the method's name or the file of a merge. Raises ConfigError for arguments that a merge can't have."""
    if picture is not None:
        fix = "`rlhf merge --diff A B --picture FILE.png`"
        raise ConfigError("there is nothing to draw without `--diff`", place="--picture", fix=fix)
    fix = "`rlhf merge METHOD --model A --model B --output DIR`, or `rlhf merge --diff A B`"
    method = refuse_flag(target, "a method or a file", fix=fix)
    if resume and overwrite:
        problem = "a merge is either continued or started over"
        raise ConfigError(problem, place="--resume and --overwrite", fix="choose one")
    return method


def _adapter_at(target: str) -> str | None:
    """Return the adapter that is to be folded, where a directory or a `BASE+ADAPTER` was named in place of a method.

    Raises:
        ModelError: the directory holds none.
    """
    from rlhf_core import registry
    from rlhf_core.infra.model_files import is_adapter, split_adapter
    from rlhf_core.publishing.saved_model import find_saved_model

    pair = split_adapter(target)
    if pair is not None:
        return target if Path(pair[1]).expanduser().is_dir() else None
    # A method's package often stands in a directory of the method's name.
    if not Path(target).expanduser().is_dir() or target in registry.mergers:
        return None
    found = find_saved_model(target).directory
    if found is None:
        fix = f"`rlhf export {target} --merged --output DIR`"
        raise ModelError("a checkpoint is no adapter that can be folded here", place=target, fix=fix)
    if not is_adapter(str(found)):
        fix = "`rlhf merge METHOD --model A --model B --output DIR`, or `rlhf export` for another dtype"
        raise ModelError("is a whole model: there is no adapter to fold", place=target, fix=fix)
    return str(found)


def _merge(job: MergeJob, evaluate: str | None, *, resume: bool, overwrite: bool) -> MergeResult:
    """Merge and show progress. Raises Interrupted on Ctrl-C, with the command that continues."""
    from rlhf_core.infra.progress import ByteBar
    from rlhf_core.merging.output import unfinished

    try:
        with ByteBar("merging") as bar:
            return job.merger(evaluate=evaluate, progress=bar).merge(resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as error:
        # typer would turn it into an exit code alone, without saying what is left behind.
        text = "stopped by Ctrl-C"
        if job.config.output and unfinished(Path(job.config.output).expanduser()).is_dir():
            # What the new model shall replace is noted beside it, and the two flags don't go together.
            instead = " in place of `--overwrite`" if overwrite else ""
            text += f"; the same command with `--resume`{instead} continues the merge"
        raise Interrupted(text) from error


def _report(result: MergeResult, *, as_json: bool) -> None:
    """Print what the method chose, how much was read and written in which time, and where the model is."""
    rate = result.bytes_written / max(result.seconds, 1e-9)
    if as_json:
        return print_json({**vars(result), "bytes_per_second": rate})
    for name, value in result.details.items():
        print_text(f"{name}: {value}")
    print(
        f"merged: {result.tensors} tensors, {readable_size(result.bytes_read)} read,"
        f" {readable_size(result.bytes_written)} written,"
        f" {result.seconds:.1f} s, {readable_size(rate)}/s"
    )
    print(f"model: {result.output}")
    return None


def _describe(job: MergeJob, *, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Print what would be read and written, as comments above the resolved configuration, so that the whole is a valid file."""
    merger = job.merger()
    plan = merger.plan()
    try:
        facts = _facts(job, merger, plan)
    finally:
        plan.close()
    if as_json:
        return print_json({**facts, "config": job.resolved()})
    lines = [f"{job.plugin.qualified} {job.plugin.version}: {job.plugin.summary}".strip()]
    for one in facts["inputs"]:
        lines.append(f"{one['as']}: {one['name']} ({one['tensors']} tensors, {readable_size(one['bytes'])})")
    lines.append(
        f"tensors: {facts['merged']} merged, {facts['copied']} copied as they are, {len(facts['left_out'])} left out as tied"
        + "".join(f" ({name})" for name in facts["left_out"])
    )
    lines.append(f"output: {job.config.output or 'not set: give --output'}{_state(job, resume, overwrite)}")
    for file in facts["files"]:
        lines.append(f"  {file['name']} ({readable_size(file['bytes'])})")
    lines.append(f"disk: {readable_size(facts['bytes'])} needed, {readable_size(facts['free'])} free")
    lines.append(
        f"memory: about {readable_size(facts['memory'])} beyond the interpreter's,"
        f" {facts['threads']} threads on {facts['device']}"
    )
    if facts["free"] < facts["bytes"]:
        lines.append("not enough disk: this merge would be refused")
    print("\n".join(f"# {line}" for line in lines))
    print(job.to_yaml(), end="")
    return None


def _facts(job: MergeJob, merger: ModelMerger, plan: Any) -> dict[str, Any]:
    """Return what a dry run shows, as JSON values: inputs, tensors, files, bytes of disk and memory."""
    inputs = [("base", plan.base)] if plan.base is not None else []
    inputs += [("model", model) for model in plan.models]
    place = Path(job.config.output or ".").expanduser().absolute()
    there = next(one for one in (place, *place.parents) if one.exists())
    return {
        "method": job.plugin.qualified,
        "inputs": [
            {
                "as": kind,
                "name": one.name,
                "tensors": len(one.tensors),
                "bytes": sum(entry.nbytes for entry in one.tensors.values()),
            }
            for kind, one in inputs
        ],
        "merged": sum(item.merged for item in plan.tensors),
        "copied": sum(not item.merged for item in plan.tensors),
        "left_out": list(plan.left_out),
        "output": job.config.output,
        "files": [{"name": file.name, "bytes": file.size} for file in plan.files],
        "bytes": plan.nbytes,
        "free": shutil.disk_usage(there).free,
        "memory": merger.memory_needed(plan),
        "threads": merger.threads,
        "device": str(merger.device),
    }


def _state(job: MergeJob, resume: bool, overwrite: bool) -> str:
    """Return what the output directory holds and what would become of it, in brackets."""
    from rlhf_core.merging.output import unfinished

    if job.config.output is None:
        return ""
    output = Path(job.config.output).expanduser()
    if unfinished(output).is_dir():
        return " (an unfinished merge is there: " + ("continued)" if resume else "started over without --resume)")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return " (replaced)" if overwrite else " (not empty: needs --overwrite)"
    return " (new)"
