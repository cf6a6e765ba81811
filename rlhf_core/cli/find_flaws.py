"""`rlhf find-flaws`: what is wrong with completions in files, and rewards that are pleased without being earned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_core.cli import METHOD_OPTIONS
from rlhf_core.cli.printing import print_json, print_table, print_text
from rlhf_core.cli.quick_imports import quick_imports
from rlhf_core.cli.resumable_output import OverwriteOption, check_apart
from rlhf_core.infra.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from rlhf_core.config.flaw_run import FlawRunConfig
    from rlhf_core.evaluation.estimate import Estimate
    from rlhf_core.improvement.adversarial_validator import ValidationReport


def add_to(app: typer.Typer) -> None:
    app.command("find-flaws", context_settings=METHOD_OPTIONS)(find_flaws)


def find_flaws(
    context: typer.Context,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print shares, quality and gap as JSON.")] = False,
) -> None:
    """Look for flaws in completions: `rlhf find-flaws --data samples.jsonl --output flaws.jsonl`.

    --data takes what `rlhf score` takes, such as a file that `rlhf sample` wrote. Each completion is looked at for repetition,
    truncation, refusal, contradiction (with the column `answer`) and prompt_leakage; --detectors a,b chooses among them. With
    --proxy REWARD, which the policy is trained on, and --verifier REWARD, which tells right from wrong, it is also looked at for
    reward hacking: wrong, and liked as much as right ones. Both are names or a reward model's directory; options are
    --proxy.options.NAME VALUE. Further: --right-from (1), --limit (rows), --split, --columns.completion NAME.

    --output FILE.jsonl gets the rows with the columns `flaws` (names, none where nothing was found) and `quality`; --report
    FILE.json every severity. The share of completions with each flaw is printed.
    """
    with quick_imports():
        from rlhf_core.config.flags import convert, lex, spread
        from rlhf_core.config.flaw_run import FlawRunConfig
        from rlhf_core.config.yaml_file import nest
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
        values, places = convert(lex(context.args), FlawRunConfig, owner="find-flaws")
        if "data" not in values:
            raise ConfigError("no rows are named", place="command line", fix="give `--data FILE`")
        run = FlawRunConfig.parse(nest(spread(values, FlawRunConfig)), place=places | {"": "command line"})
    report = _searched(run, overwrite=overwrite)
    if as_json:
        found = report.as_json()
        return print_json({name: value for name, value in found.items() if name != "completions"})
    _show(report)
    for path in filter(None, (run.output, run.report)):
        print_text(f"written: {path}")
    return None


def _searched(run: FlawRunConfig, *, overwrite: bool) -> ValidationReport:
    """Look at all completions, and write what was asked for.

    Raises:
        StorageError: a file exists already, and `overwrite` isn't set; or writing failed.
        DataError: there are no completions, or a row can't be read, or has a column of a new column's name.
    """
    from rlhf_core.data.completion_rows import read_completion_rows
    from rlhf_core.data.open_source import check_paths
    from rlhf_core.generation.sampler_models import reward_by_path
    from rlhf_core.improvement.adversarial_validator import AdversarialValidator
    from rlhf_core.improvement.flaw_rows import with_flaws
    from rlhf_core.infra.files import replace_file

    check_paths(run.data)
    for place, given in (("--output", run.output), ("--report", run.report)):
        if given is not None:
            check_apart(Path(given), run.data)
            if Path(given).exists() and not overwrite:
                raise StorageError("the file exists", place=f"{place} {given}", fix="`--overwrite` replaces it")
    proxy, verifier = (None if one is None else reward_by_path(one) for one in (run.proxy, run.verifier))
    validator = AdversarialValidator(run.detectors, proxy=proxy, verifier=verifier, right_from=run.right_from)
    rows = list(read_completion_rows(run.data, columns=run.columns, limit=run.limit, split=run.split))
    if not rows:
        raise DataError("holds no rows", place=", ".join(run.data))
    report = validator.validate(rows)
    if run.report is not None:
        report.save(run.report)
    if run.output is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in with_flaws(rows, report.completions)]
        replace_file(Path(run.output), "".join(lines).encode())
    return report


def _show(report: ValidationReport) -> None:
    """Print the share of completions with each flaw, their quality, and the gap between the rewards."""
    rows = [(name, *_cells(share)) for name, share in report.shares.items()]
    rows.append(("quality", *_cells(report.quality)))
    print_table(("flaw", "share", "error", "over"), rows)
    if report.gap is not None:
        auc = "unknown: all are right, or all wrong" if report.gap.auc is None else f"{report.gap.auc:.3f}"
        print_text(f"proxy's AUC for right against wrong: {auc}")
        if report.gap.rank_correlation is not None:
            print_text(f"rank correlation of proxy and verifier: {report.gap.rank_correlation}")
    print_text(f"completions: {len(report.completions):,}")


def _cells(one: Estimate) -> tuple[str, str, str]:
    return f"{one.value:.4g}", "" if one.error is None else f"{one.error:.2g}", f"{one.count:,}"
