"""`rlhf evaluate`: what a policy's completions are like, measured, with errors and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_core.cli import METHOD_OPTIONS
from rlhf_core.cli.evaluate_tasks import evaluate_tasks, load_task_run, names_tasks
from rlhf_core.cli.other_command import refuse_file_of_another
from rlhf_core.cli.printing import print_json, print_note, print_table, print_text
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.cli.resumable_output import (
    OverwriteOption,
    ResumeOption,
    check_apart,
    output_path,
    output_state,
    stoppable,
)
from rlhf_core.infra.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from rlhf_core.config.evaluation import EvaluationRunConfig
    from rlhf_core.config.training import ModelConfig
    from rlhf_core.data.prompt_rows import PromptRow
    from rlhf_core.evaluation.estimate import Estimate
    from rlhf_core.evaluation.evaluation_report import EvaluationReport
    from rlhf_core.evaluation.evaluator import RLHFEvaluator
    from rlhf_core.models import PolicyModel

_Compare = Annotated[
    Path | None,
    typer.Option(
        "--compare",
        metavar="DIR",
        help="An earlier evaluation of the same prompts: print the differences to it, prompt by prompt.",
    ),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration; load and write nothing.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the estimates as JSON.")]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(evaluate)


def evaluate(
    context: typer.Context,
    compare: _Compare = None,
    dry_run: _DryRun = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    as_json: _Json = False,
) -> None:
    """Evaluate a model: `rlhf evaluate --model M --prompts rows.jsonl --validator numeric_answer --n 8 --output DIR`.

    Every prompt is completed n times, once for all metrics, and each of these is measured where there is what it needs:

    - accuracy, pass@k, majority@k: --validator NAME (and `answer` in the rows); calibration, too
    - reward: --reward NAME, or a reward model's path; reward_accuracy: --preferences FILE with `chosen` and `rejected`
    - kl (per token and per sequence): --reference MODEL
    - win_rate, also at equal length: --baseline MODEL, or --baseline-column COLUMN; by rewards, validators and --judge MODEL
    - diversity (distinct-n, self-BLEU); embedding_distance: --embeddings MODEL; length

    --metrics a,b chooses among them. Further: --n (completions per prompt; 4), --k 2,8, --temperature (1), --top-p,
    --max-new-tokens (256), --stop TEXT, --seed, --limit (rows), --batch-size, --precision, --kl exact|k1|k3, --confidence,
    --right-from, --bins, --distinct, --resamples, --dataset.wrap chat, --dataset.columns.prompt COLUMN. A YAML file with these
    names may come first: `rlhf evaluate evaluation.yaml --model M`.

    --output DIR gets evaluation.json and completions.jsonl. Ctrl-C or SIGTERM stops; --resume continues.

    With --tasks gsm8k,... the library lm-eval asks instead, and the engine answers: --include-path DIR (task files of your own),
    --limit (rows per task), --num-fewshot, --apply-chat-template, --system-instruction, --generation.max_gen_toks 512, --seed,
    --allow-code; --output DIR gets lm_eval.json.
    """
    file, flags = _file_and_flags(context.args)
    no_bars_in_logs()
    refuse_file_of_another(file, "evaluate", checked=dry_run)
    if names_tasks(file, flags):
        _refuse_for_tasks({"--compare": compare is not None, "--resume": resume})
        return evaluate_tasks(load_task_run(file, flags), dry_run=dry_run, overwrite=overwrite, as_json=as_json)
    with quick_imports():
        from rlhf_core.evaluation.evaluation_job import load_evaluation_run
        from rlhf_core.evaluation.evaluation_report import EvaluationReport
        from rlhf_core.generation.sampling_job import read_run_prompts
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
        run = load_evaluation_run(file, flags)
    directory = output_path(run.output, resume=resume, overwrite=overwrite)
    before = None if compare is None else EvaluationReport.load(compare)
    rows = read_run_prompts(run)
    if directory is not None:
        _check_directory(directory, [*run.prompts, *run.preferences])
    if dry_run:
        return _describe(run, rows, _state_of(directory, resume=resume, overwrite=overwrite))
    if directory is not None:
        from rlhf_core.evaluation.evaluator import COMPLETIONS_FILE, EVALUATED

        EVALUATED.check_output(directory / COMPLETIONS_FILE, resume=resume, overwrite=overwrite)
    report = _evaluated(_opened(run, rows), directory, resume=resume, overwrite=overwrite)
    return _print(report, before, directory, as_json=as_json)


def _file_and_flags(tokens: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the configuration file, if one comes first, and the flags."""
    if not tokens or tokens[0].startswith("-"):
        return None, list(tokens)
    if not tokens[0].endswith((".yaml", ".yml")):
        fix = "`rlhf evaluate --model M --prompts FILE`, or a .yaml file first"
        raise ConfigError("isn't an option, nor a YAML file", place="command line", got=f"`{tokens[0]}`", fix=fix)
    return tokens[0], list(tokens[1:])


def _check_directory(directory: Path, inputs: Sequence[str]) -> None:
    """Refuse an output that is a file, or that would replace a file which is read.

    Raises:
        StorageError: it is one. ConfigError: it would.
    """
    from rlhf_core.evaluation.evaluator import COMPLETIONS_FILE

    if directory.is_file():
        raise StorageError("is a file, not a directory", place=str(directory), fix="choose another `--output`")
    check_apart(directory / COMPLETIONS_FILE, inputs)


def _state_of(directory: Path | None, *, resume: bool, overwrite: bool) -> str:
    """Return what an evaluation would do with its output directory, as text; empty where it writes none."""
    from rlhf_core.evaluation.evaluator import COMPLETIONS_FILE

    return "" if directory is None else output_state(directory / COMPLETIONS_FILE, resume=resume, overwrite=overwrite)


def _refuse_for_tasks(given: Mapping[str, bool]) -> None:
    """Refuse options of evaluations on prompts where tasks of lm-eval are done."""
    for option, is_given in given.items():
        if is_given:
            raise ConfigError("isn't for tasks of lm-eval", place=option, fix="leave it out")


def _opened(run: EvaluationRunConfig, rows: Sequence[PromptRow]) -> RLHFEvaluator:
    """Return the evaluator with its models loaded."""
    from rlhf_core.cli.model_argument import check_model, open_policy
    from rlhf_core.evaluation.evaluation_job import models_of, open_evaluator

    for model in models_of(run).values():
        check_model(model.path)

    def load(model: ModelConfig) -> PolicyModel:
        return open_policy(model, precision=run.precision)

    return open_evaluator(run, load, prompts=rows)


def _evaluated(evaluator: RLHFEvaluator, directory: Path | None, *, resume: bool, overwrite: bool) -> EvaluationReport:
    """Evaluate, showing how far it is.

    Raises:
        Stopped: by SIGTERM or Ctrl-C; every prompt that was measured is in the file.
        Interrupted: by one of these, where there is no file.
    """
    from rlhf_core.generation.watching import watching
    from rlhf_core.infra.progress import RowBar

    total = len(evaluator.prompts)
    if directory is None:
        with stoppable(None), RowBar(total=total) as bar, watching(bar.add_tokens):
            return evaluator.evaluate(progress=bar.update)
    with evaluator.open_output(directory, resume=resume, overwrite=overwrite) as file:
        with (
            stoppable(file, of=f"of {total:,} prompts"),
            RowBar(total=total, done=file.written) as bar,
            watching(bar.add_tokens),
        ):
            return evaluator.evaluate(file, progress=bar.update)


def _print(report: EvaluationReport, before: EvaluationReport | None, directory: Path | None, *, as_json: bool) -> None:
    from rlhf_core.evaluation.evaluation_report import compare, not_compared

    differences = None if before is None else compare(before, report)
    notes = [*report.notes, *([] if before is None else not_compared(before, report))]
    if as_json:
        found = report.summary() | {"notes": notes}
        if differences is not None:
            found["differences"] = {name: one.as_json() for name, one in differences.items()}
        return print_json(found | ({} if directory is None else {"output": str(directory)}))
    header = ("metric", "value", "error", "95 % interval", "over", *(() if differences is None else ("difference",)))
    print_table(header, [_cells(name, one, differences) for name, one in report.metrics.items()])
    for note in notes:
        print_note(f"note: {note}")
    print_text(f"prompts: {len(report.prompts):,}, {report.seconds:.1f} seconds")
    if directory is not None:
        print_text(f"evaluation: {directory / 'evaluation.json'}")
    return None


def _cells(name: str, one: Estimate, differences: Mapping[str, Estimate] | None) -> tuple[str, ...]:
    interval = "" if one.low is None or one.high is None else f"{one.low:.4g} to {one.high:.4g}"
    error = "" if one.error is None else f"{one.error:.2g}"
    cells = (name, f"{one.value:.4g}", error, interval, f"{one.count:,}")
    if differences is None:
        return cells
    apart = differences.get(name)
    if apart is None:
        return (*cells, "")
    return (*cells, f"{apart.value:+.4g}" + ("" if apart.error is None else f" ± {apart.error:.2g}"))


def _describe(run: EvaluationRunConfig, rows: Sequence[PromptRow], state: str) -> None:
    """Print the resolved configuration as a valid file, headed by comments on what would be measured and done with `output`."""
    from rlhf_core.config.yaml_file import dump_yaml
    from rlhf_core.evaluation.evaluation_job import metrics_of
    from rlhf_core.infra.redact import redact

    print(f"# prompts: {len(rows):,}, {run.completions} completion{'s' * (run.completions > 1)} each")
    print(f"# metrics: {', '.join(metrics_of(run))}")
    if state:
        print(f"# output: {run.output} ({state})")
    print(dump_yaml(redact(run.model_dump(mode="json"))), end="")
