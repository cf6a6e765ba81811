"""`rlhf merge`: checkpoints into one, by a method or a file; and how far two checkpoints are apart."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli import shell_completion
from rlhf_core.cli.printing import print_json, print_table, print_text
from rlhf_core.cli.quick_imports import quick_imports
from rlhf_core.infra.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from rlhf_core.evaluation.weight_diff import Difference, Distance
    from rlhf_core.merging.job import MergeJob
    from rlhf_core.merging.merge import MergeResult, ModelMerger

log = logging.getLogger(__name__)

# Whatever typer doesn't know is an option of the method, read once the method is known.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help", "-h"]}


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=_PASS_ON)(merge)


def merge(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="METHOD_OR_FILE",
            help="A method's name or a configuration file, ours or mergekit's, then any of its options.",
            show_default=False,
            autocompletion=shell_completion.mergers,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the resolved configuration; write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge into --output that was killed.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            metavar="FILE.py:FUNCTION",
            help="Function that scores a model's directory, larger being better: for greedy_soup.",
        ),
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option("--diff", metavar="A B", help="Show how far two checkpoints are apart, instead of merging."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE.png", help="Draw what --diff finds into a file.")
    ] = None,
) -> None:
    """Merge: `rlhf merge ties --base B --model A=0.7 --model C=0.3 --output O --density 0.2`, or `rlhf merge CONFIG.yaml`.

    --model PATH[=WEIGHT] names a model, as often as there are models; --base the one that differences are taken from. A
    configuration file is flat: method, base, models (each a name, or model, weight and its own options), output, then the
    method's options by name. Each is also a flag, which wins over the file, a model's own as `--models.0.density 0.5`; so are
    dtype, tokenizer, shard_size, threads, device, seed, hash_inputs, and `--compat mergekit` for its definitions. `rlhf show
    METHOD` lists a method's options. Files of mergekit are read unchanged. A merge that was killed is continued by --resume.

    `rlhf merge --diff A B` shows the distances between two checkpoints by layer.
    """
    if diff is not None:
        return _diff(diff, target, context.args, picture=picture, as_json=as_json)
    if picture is not None:
        raise ConfigError(
            "there is nothing to draw", place="--picture", fix="`rlhf merge --diff A B --picture FILE.png`"
        )
    if target is None or target.startswith("-"):
        raise ConfigError(
            "a method or a file comes first",
            place="command line",
            got=None if target is None else f"`{target}`",
            fix="`rlhf merge METHOD --model A --model B --output DIR`, or `rlhf merge --diff A B`",
        )
    if resume and overwrite:
        raise ConfigError(
            "a merge is either continued or started over", place="--resume and --overwrite", fix="choose one"
        )
    with quick_imports():
        from rlhf_core.merging.job import load_merge_job
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
        job = load_merge_job(target, flags=context.args)
    if dry_run:
        return _describe(job, resume=resume, overwrite=overwrite, as_json=as_json)
    result = _merge(job, evaluate, resume=resume, overwrite=overwrite)
    return _report(result, as_json=as_json)


def _merge(job: MergeJob, evaluate: str | None, *, resume: bool, overwrite: bool) -> MergeResult:
    from rlhf_core.infra.progress import ByteBar
    from rlhf_core.merging.output import unfinished

    try:
        with ByteBar("merging") as bar:
            return job.merger(evaluate=evaluate, progress=bar).merge(resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as error:
        # typer would make an exit of it, without what is left behind.
        text = "stopped by Ctrl-C"
        if job.config.output and unfinished(Path(job.config.output).expanduser()).is_dir():
            # What the new model shall replace is noted beside it, and the two flags don't go together.
            text += (
                "; the same command with `--resume`" + (" in place of `--overwrite`" if overwrite else "") + " goes on"
            )
        raise Interrupted(text) from error


def _report(result: MergeResult, *, as_json: bool) -> None:
    rate = result.bytes_written / max(result.seconds, 1e-9)
    if as_json:
        return print_json({**vars(result), "bytes_per_second": rate})
    for name, value in result.details.items():
        print_text(f"{name}: {value}")
    print(
        f"merged: {result.tensors} tensors, {size(result.bytes_read)} read, {size(result.bytes_written)} written,"
        f" {result.seconds:.1f} s, {size(rate)}/s"
    )
    print(f"model: {result.output}")
    return None


def _describe(job: MergeJob, *, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Print what would be read and written as comments, then the resolved configuration, itself a valid file."""
    merger = job.merger()
    plan = merger.plan()
    try:
        facts = _facts(job, merger, plan)
    finally:
        for one in (plan.base, *plan.models):
            if one is not None:
                one.close()
    if as_json:
        return print_json({**facts, "config": job.resolved()})
    lines = [f"{job.plugin.qualified} {job.plugin.version}: {job.plugin.summary}".strip()]
    for one in facts["inputs"]:
        lines.append(f"{one['as']}: {one['name']} ({one['tensors']} tensors, {size(one['bytes'])})")
    lines.append(
        f"tensors: {facts['merged']} merged, {facts['copied']} copied as they are, {len(facts['left_out'])} left out as tied"
        + "".join(f" ({name})" for name in facts["left_out"])
    )
    lines.append(f"output: {job.config.output or 'not set: give --output'}{_state(job, resume, overwrite)}")
    for file in facts["files"]:
        lines.append(f"  {file['name']} ({size(file['bytes'])})")
    lines.append(f"disk: {size(facts['bytes'])} needed, {size(facts['free'])} free")
    lines.append(
        f"memory: about {size(facts['memory'])} beyond the interpreter's, {facts['threads']} threads on {facts['device']}"
    )
    if facts["free"] < facts["bytes"]:
        lines.append("not enough disk: this merge would be refused")
    print("\n".join(f"# {line}" for line in lines))
    print(job.to_yaml(), end="")
    return None


def _facts(job: MergeJob, merger: ModelMerger, plan: Any) -> dict[str, Any]:
    from rlhf_core.merging.merge import memory_needed

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
                "tensors": len(one.all_tensors),
                "bytes": sum(entry.nbytes for entry in one.all_tensors.values()),
            }
            for kind, one in inputs
        ],
        "merged": sum(item.merged for item in plan.items),
        "copied": sum(not item.merged for item in plan.items),
        "left_out": list(plan.left_out),
        "output": job.config.output,
        "files": [{"name": file.name, "bytes": file.size} for file in plan.files],
        "bytes": plan.nbytes,
        "free": shutil.disk_usage(there).free,
        "memory": memory_needed(merger, plan),
        "threads": merger.threads,
        "device": str(merger.device),
    }


def _state(job: MergeJob, resume: bool, overwrite: bool) -> str:
    """Return what there is at the place of the output."""
    from rlhf_core.merging.output import unfinished

    if job.config.output is None:
        return ""
    output = Path(job.config.output).expanduser()
    if unfinished(output).is_dir():
        return " (an unfinished merge is there: " + ("continued)" if resume else "started over without --resume)")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return " (replaced)" if overwrite else " (not empty: needs --overwrite)"
    return " (new)"


def _diff(names: tuple[str, str], target: str | None, rest: list[str], *, picture: Path | None, as_json: bool) -> None:
    if target is not None or rest:
        raise ConfigError(
            "unexpected argument",
            place="--diff",
            got=f"`{target or rest[0]}`",
            fix="`rlhf merge --diff A B [--picture FILE.png]`",
        )
    with quick_imports():
        from rlhf_core.evaluation.weight_diff import diff, draw
        from rlhf_core.infra.progress import ByteBar
        from rlhf_core.registry.plugin_logs import setup_logging

    setup_logging()
    with ByteBar("comparing") as bar:
        found = diff(*names, progress=bar)
    if picture is not None:
        draw(found, picture)
    if as_json:
        return print_json({**found.as_dict(), "picture": None if picture is None else str(picture)})
    _print_difference(found)
    if picture is not None:
        print(f"picture: {picture}")
    return None


def _print_difference(found: Difference) -> None:
    from rlhf_core.evaluation.weight_diff import PARTS

    table = found.by_layer()
    parts = [part for part in PARTS if part in found.by_part()]
    header = ("layer", *parts, "all", "cosine", "max |b - a|")
    rows = [_row(row, cells, parts) for row, cells in table.items()]
    rows.append(_row("all", {**found.by_part(), "all": found.total}, parts))
    print_text(f"‖b - a‖ / ‖a‖ by layer and part; a: {found.names[0]}, b: {found.names[1]}")
    print_table(header, rows)
    farthest = sorted(found.tensors.items(), key=lambda entry: -entry[1].relative)[:5]
    if farthest and farthest[0][1].apart > 0:
        print("\nfarthest apart:")
        print_table(
            ("tensor", "‖b - a‖ / ‖a‖", "cosine", "max |b - a|"),
            [(name, f"{one.relative:.3g}", f"{one.cosine:.6f}", f"{one.largest:.3g}") for name, one in farthest],
        )
    else:
        print("\nall values are equal")
    for name, only in zip(found.names, found.only, strict=True):
        if only:
            print_text(f"only in {name}: {', '.join(only)}")
    for name, (first, second) in found.reshaped.items():
        print_text(f"of two shapes, left out: {name} {list(first)}, {list(second)}")


def _row(name: str, cells: dict[str, Distance], parts: list[str]) -> tuple[str, ...]:
    whole = cells["all"]
    shares = (f"{cells[part].relative:.3g}" if part in cells else "" for part in parts)
    return (name, *shares, f"{whole.relative:.3g}", f"{whole.cosine:.6f}", f"{whole.largest:.3g}")


def size(count: float) -> str:
    """Return a number of bytes for people, in powers of a thousand."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
