"""`rlhf sample`: completions of any sampler for files of prompts or texts, written row by row or printed."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli import METHOD_OPTIONS, shell_completion
from rlhf_core.cli.first_argument import refuse_flag
from rlhf_core.cli.other_command import refuse_file_of_another
from rlhf_core.cli.printing import print_heading, print_json_line, print_note, print_text, print_wrapped
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.cli.resumable_output import (
    OverwriteOption,
    ResumeOption,
    check_apart,
    output_path,
    output_state,
    stoppable,
)

if TYPE_CHECKING:
    from rlhf_core.config.training import ModelConfig
    from rlhf_core.contracts.completion import Completion
    from rlhf_core.contracts.sampler import Sampler
    from rlhf_core.data.prompt_rows import PromptRow
    from rlhf_core.data.row_output import RowOutput
    from rlhf_core.generation.sampling_job import SamplingJob
    from rlhf_core.models import PolicyModel

log = logging.getLogger(__name__)

_ENDS = {
    "end": "ended",
    "stop": "ended by a stop text",
    "rule": "ended by a rule",
    "confidence": "cut for too little confidence",
    "length": "cut off at the limit",
}
"""Why a completion stopped → how that is said."""

_Target = Annotated[
    str,
    typer.Argument(
        metavar="SAMPLER_OR_FILE",
        help="A sampler's name, as `rlhf list samplers` shows it, or a configuration file; then any of its options.",
        autocompletion=shell_completion.samplers,
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(sample)


def sample(
    context: typer.Context,
    target: _Target,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration; load and write nothing.")
    ] = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Without --output: print rows as JSON, one per line; with it: the result.")
    ] = False,
) -> None:
    """Sample completions: `rlhf sample generate --model M --prompts rows.jsonl --output out.jsonl --n 4 --temperature 0.7`.

    --prompts takes a file (.jsonl, .json, .csv, .tsv, .parquet; .txt with one
    prompt per line), a hub name, a text, or `-` for the lines of standard input,
    and may be repeated. --model takes a directory, an adapter, a run's directory,
    a GGUF file or a hub name; the sampler's other roles have flags of their own,
    such as --reward NAME. --output FILE.jsonl keeps the rows. Further: --n
    (completions per prompt; 1), --temperature (1), --top-p, --top-k, --min-p,
    --max-new-tokens (256), --stop TEXT, --seed, --limit (rows), --batch-size,
    --model.precision, --ids, --logprobs, --dataset.columns.prompt COLUMN,
    --dataset.wrap chat, and every other option of the sampler: `rlhf show
    sampler:generate --all` lists them with their defaults.

    Rows are written in the order of the prompts, with all of their columns.
    Ctrl-C or SIGTERM stops; --resume continues, and gives the same rows as if it
    had never stopped.
    """
    refuse_flag(target, "a sampler or a file", fix="`rlhf sample SAMPLER --model M --prompts FILE`")
    no_bars_in_logs()
    with quick_imports():
        from rlhf_core.generation.sampling_job import load_sampling_job
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
        refuse_file_of_another(target, "sample", checked=dry_run)
        job = load_sampling_job(target, flags=context.args)
    output = output_path(job.run.output, resume=resume, overwrite=overwrite)
    if output is not None:
        check_apart(output, job.run.prompts)
    if dry_run:
        return _describe(job, output, resume=resume, overwrite=overwrite)
    if output is not None:
        from rlhf_core.generation.sample_file import SAMPLES

        SAMPLES.check_output(output, resume=resume, overwrite=overwrite)
    return _sample(job, output, resume=resume, overwrite=overwrite, as_json=as_json)


def _sample(job: SamplingJob, output: Path | None, *, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Read the prompts, load the models, and sample."""
    from rlhf_core.cli.model_argument import check_model
    from rlhf_core.generation.sample_file import open_sample_file, recorded_batch_size
    from rlhf_core.generation.sampled_rows import check_columns, input_columns
    from rlhf_core.infra.devices import DeviceManager

    rewards = job.rewards()
    for model in (model for models in job.policies().values() for model in models):
        check_model(model.path)
    rows = job.prompts()
    check_columns(rows, job.run)
    sampler = _loaded(job, rewards)
    _warn_of_plain_text(sampler, rows)
    together = job.run.rows_together(DeviceManager().kind)
    if output is None:
        return _print_rows(job, sampler, rows, together, as_json=as_json)
    if resume and job.run.batch_size is None:  # as it was, so that the rounding is the same
        together = recorded_batch_size(output) or together
    record = job.record(sampler, rows, together) | {
        "sources": job.run.prompts,
        "command": _command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with open_sample_file(
        output, record, [input_columns(row) for row in rows], resume=resume, overwrite=overwrite
    ) as file:
        before = file.written
        if before:
            log.info("%s has %d of %d rows already", output, before, len(rows))
        speed = _write_rows(job, sampler, rows, together, file)
    if as_json:
        return print_json_line(
            {"output": str(output), "rows": len(rows), "sampled": len(rows) - before, "tokens_per_second": speed}
        )
    if before == len(rows):
        return print_text(f"all {_rows(before)} of {output} were written already")
    print_text(f"sampled: {_rows(len(rows) - before)}, {speed:,.0f} tokens/s")
    print_text(f"rows: {output}")
    return None


def _loaded(job: SamplingJob, rewards: dict[str, Any]) -> Sampler:
    """Return the sampler with its models loaded, and the options of encoding applied to their tokenizers."""
    from rlhf_core.cli.model_argument import open_policy
    from rlhf_core.generation.sampling_job import PolicyPreparation

    prepared = PolicyPreparation(job.run)

    def load(model: ModelConfig) -> PolicyModel:
        return prepared(open_policy(model, precision=job.run.precision))

    return job.sampler(job.options, **job.loaded_with(load), **rewards)


def _warn_of_plain_text(sampler: Sampler, rows: Sequence[PromptRow]) -> None:
    """Warn where texts are continued as they are by a model that has a chat template, and nothing says that this is wanted."""
    from rlhf_core.data.text_options import TextOptions
    from rlhf_core.generation.sampler_models import policies_of

    for policy in policies_of(sampler).values():
        tokenizer = policy.tokenizer
        if not tokenizer.chat_template or TextOptions.saved_with(tokenizer).wrap is not None:
            continue
        if any(isinstance(row.prompt, str) for row in rows):
            log.warning(
                "prompts of plain text are continued as they are, though the model has a chat template: `--dataset.wrap chat`"
                " makes each the user's turn, `none` keeps them as they are"
            )
            return


def _write_rows(job: SamplingJob, sampler: Sampler, rows: Sequence[PromptRow], together: int, file: RowOutput) -> float:
    """Sample the rows that a file lacks and append them; return the tokens per second.

    Raises:
        Stopped: by SIGTERM or Ctrl-C; every row that was sampled is in the file.
    """
    from rlhf_core.generation.sampled_rows import output_row, sample_rows
    from rlhf_core.generation.watching import watching
    from rlhf_core.infra.progress import RowBar

    run = job.run
    with (
        stoppable(file, of=f"of {_rows(len(rows))}"),
        RowBar(total=len(rows), done=file.written) as bar,
        watching(bar.add_tokens),
    ):
        found = sample_rows(sampler, rows, n=run.n, seed=run.seed, together=together, start=file.written)
        for number, completions in found:
            file.append(output_row(rows[number], completions, run))
            bar.update(file.written, sum(len(one.ids) for one in completions))
            if file.written % together == 0:
                file.note()
    file.note(status="done")
    return bar.tokens_per_second


def _print_rows(job: SamplingJob, sampler: Sampler, rows: Sequence[PromptRow], together: int, *, as_json: bool) -> None:
    """Sample all rows and print each as its completions come."""
    from rlhf_core.generation.sampled_rows import output_row, sample_rows
    from rlhf_core.generation.watching import watching
    from rlhf_core.infra.progress import RowBar

    run = job.run
    with stoppable(None), RowBar(total=len(rows)) as bar, watching(bar.add_tokens):
        for number, completions in sample_rows(sampler, rows, n=run.n, seed=run.seed, together=together):
            if as_json:
                print_json_line(output_row(rows[number], completions, run))
            else:
                _print_row(f"{number + 1}/{len(rows)}", rows[number], completions)
            bar.update(number + 1, sum(len(one.ids) for one in completions))


def _print_row(number: str, row: PromptRow, completions: Sequence[Completion]) -> None:
    """Print a prompt and its completions for people."""
    print_heading(f"{number}  {_as_text(row)}")
    for place, one in enumerate(completions, 1):
        which = f"completion {place} of {len(completions)}" if len(completions) > 1 else "completion"
        count = f"{len(one.ids):,} token{'s' * (len(one.ids) != 1)}"
        score = [f"score {one.score:.4g}"] if one.score is not None else []
        print_note(" · ".join([which, count, _ENDS.get(one.stop_reason, one.stop_reason), *score]))
        print_wrapped(one.text.strip("\n"))
    print()


def _as_text(row: PromptRow) -> str:
    """Return a prompt as one line: of a chat its last message."""
    text = row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1].get("content", ""))
    return " ".join(text.split())


def _describe(job: SamplingJob, output: Path | None, *, resume: bool, overwrite: bool) -> None:
    """Print the resolved configuration as a valid file, headed by comments on what would be read and written."""
    rows = job.prompts()
    lines = [
        f"{job.plugin.qualified} {job.plugin.version}: {job.plugin.summary}".strip(),
        f"prompts: {_rows(len(rows))}, {job.run.n} completion{'s' * (job.run.n > 1)} each",
    ]
    if output is not None:
        state = output_state(output, resume=resume, overwrite=overwrite)
        lines.append(f"output: {output} ({state})")
    print("\n".join(f"# {line}" for line in lines))
    print(job.to_yaml(), end="")


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _command() -> str:
    """Return this process's command line, secrets redacted."""
    from rlhf_core.infra.redact import redact_text

    return redact_text(shlex.join(["rlhf", *sys.argv[1:]]))
