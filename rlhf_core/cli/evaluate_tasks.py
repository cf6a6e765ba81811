"""`rlhf evaluate --tasks`: tasks of lm-eval, answered by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.cli.printing import print_json, print_table, print_text
from rlhf_core.infra.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from rlhf_core.config.lm_eval_run import LmEvalRunConfig
    from rlhf_core.evaluation.lm_eval_tasks import TaskReport

REPORT_FILE = "lm_eval.json"


def names_tasks(file: str | None, flags: Sequence[str]) -> bool:
    """Tell whether an evaluation is one of lm-eval's tasks: by a flag, or in its file."""
    from rlhf_core.config.flags import lex
    from rlhf_core.config.yaml_file import load_yaml

    return any(flag.key == "tasks" for flag in lex(flags)) or (file is not None and "tasks" in load_yaml(file)[0])


def load_task_run(file: str | None, flags: Sequence[str]) -> LmEvalRunConfig:
    """Return the options of a run of tasks.

    Raises:
        ConfigError: an unknown option (with the nearest), a missing or wrong one.
    """
    from rlhf_core.config.file_paths import find_beside
    from rlhf_core.config.flags import convert, lex, spread
    from rlhf_core.config.lm_eval_run import LmEvalRunConfig
    from rlhf_core.config.yaml_file import load_yaml, nest, overlay

    values, places = load_yaml(file) if file is not None else ({}, {"": "command line"})
    values = find_beside(values, file) if file is not None else values
    over, over_places = convert(lex(flags), LmEvalRunConfig, owner="evaluate --tasks")
    values = overlay(spread(values, LmEvalRunConfig), nest(spread(over, LmEvalRunConfig)))
    places = {**places, **over_places}
    if values.get("model") is None:
        raise ConfigError("`model` is missing", place=places[""], fix="give `--model PATH`, or `model:` in a file")
    return LmEvalRunConfig.parse(values, place=places)


def evaluate_tasks(run: LmEvalRunConfig, *, dry_run: bool, overwrite: bool, as_json: bool) -> None:
    """Do the tasks, write the report, and print it.

    Raises:
        StorageError: there is a report already, and `overwrite` isn't set; or writing failed.
    """
    from rlhf_core.evaluation.lm_eval_tasks import require_lm_eval

    if dry_run:
        from rlhf_core.config.yaml_file import dump_yaml
        from rlhf_core.infra.redact import redact

        return print_text(dump_yaml(redact(run.model_dump(mode="json"))).rstrip("\n"))
    require_lm_eval()
    path = None if run.output is None else Path(run.output).expanduser() / REPORT_FILE
    if path is not None and path.exists() and not overwrite:
        raise StorageError(
            "the file exists", place=str(path), fix="`--overwrite` replaces it; or choose another --output"
        )
    report = _done(run)
    if path is not None:
        report.write(path)
    if as_json:
        return print_json(report.as_json() | ({} if path is None else {"output": str(path)}))
    rows = [
        (name, f"{one.value:.4g}", "" if one.error is None else f"{one.error:.2g}", f"{one.count:,}")
        for name, one in report.metrics.items()
    ]
    rows += [
        (f"{score.task}/{name}", value, "", "")
        for score in report.tasks.values()
        for name, value in score.not_finite.items()
    ]
    print_table(("metric", "value", "error", "rows"), rows)
    print_text(f"{report.seconds:.1f} seconds")
    if path is not None:
        print_text(f"report: {path}")
    return None


def _done(run: LmEvalRunConfig) -> TaskReport:
    """Load the model, and do the tasks."""
    from rlhf_core.cli.model_argument import check_model, open_policy
    from rlhf_core.evaluation.lm_eval_tasks import run_lm_eval_tasks

    check_model(run.model.path)
    policy = open_policy(run.model, precision=run.precision)
    return run_lm_eval_tasks(policy, run.tasks, include_path=run.include_path, config=run)
