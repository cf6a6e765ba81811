"""`rlhf runs`, `rlhf plot` and `rlhf diff`: which runs there are, how their metrics went, and how two of them differ."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_core.cli.printing import encodable, print_heading, print_json, print_note, print_table, print_text, text_width
from rlhf_core.cli.quick_imports import quick_imports
from rlhf_core.cli.run_texts import require_run
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.model_files import near_path

if TYPE_CHECKING:
    from rlhf_core.evaluation.report.run_files import RunHistory
    from rlhf_core.evaluation.run_list import RunSummary

_STYLES = {"running": "bold", "failed": "red", "damaged": "red", "killed": "yellow", "stopped": "yellow"}
_MOST = 160
"""Characters of a value in the table of differences; a terminal folds what doesn't fit."""

_Directory = Annotated[
    Path | None,
    typer.Argument(
        metavar="DIR", help="Where to look; without it `runs`, or the current directory where that isn't there."
    ),
]
_Metric = Annotated[str | None, typer.Option("--metric", metavar="NAME", help="The metric to show of every run.")]
_Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; a run may be in progress.")]
_Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAMES",
        help="Metrics on common axes, such as loss,eval_loss; repeated, it draws a chart each. Without it the reward or loss.",
    ),
]
_Output = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a picture, .png or .svg, instead of drawing in the terminal.")
]
_Log = Annotated[bool, typer.Option("--log", help="A logarithmic vertical axis, where all values are above 0.")]
_Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
_Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]


def add_to(app: typer.Typer) -> None:
    app.command()(runs)
    app.command()(plot)
    app.command()(diff)


def runs(directory: _Directory = None, metric: _Metric = None, as_json: _Json = False) -> None:
    """List the runs below a directory: status, method, model, steps, a metric's last and best value, and when it wrote last.

    The metric is the one by which a run finds its best checkpoint (`keep_best`, `early_stopping`), else its reward, accuracy or
    loss on held-out rows. A run whose process is gone without having written how it ended is `killed`; `rlhf train RUN --resume`
    continues it. `failed at start` is one that failed before its first step, which holds nothing that was trained. What failed is
    said under the table.
    """
    with quick_imports():
        from rlhf_core.evaluation.run_list import list_runs
    place = directory or (Path("runs") if Path("runs").is_dir() else Path())
    if not place.is_dir():
        what = "is a file, not a directory" if place.exists() else "no such directory"
        near = None if place.exists() else near_path(place)
        fix = near if near is not None and near.startswith("did you mean") else "give a directory with runs in it"
        raise ConfigError(what, place=str(place), fix=fix)
    found = list_runs(place, metric)
    if as_json:
        return print_json([run.as_dict() for run in found])
    if not found:
        return print_text(f"no runs below {place}")
    return _print_runs(found)


def _print_runs(found: list[RunSummary]) -> None:
    """Print runs as a table, and what failed ones ended with."""
    from rlhf_core.evaluation.run_list import age

    columns: dict[str, list[str]] = {
        "run": [run.name for run in found],
        "status": ["failed at start" if run.never_began else run.status for run in found],
        "method": [run.method for run in found],
        "model": [run.model for run in found],
        "steps": [f"{run.step}" if run.total_steps is None else f"{run.step}/{run.total_steps}" for run in found],
        "metric": [run.metric or "" for run in found],
        "last": [_figure(run.last) for run in found],
        "best": [_figure(run.best) + (f" @{run.best_step}" if run.best is not None else "") for run in found],
        "ago": [age(run.updated) for run in found],
    }
    # Names are easier to read whole: where all doesn't fit, the model goes first, which the runs of a folder often share.
    for name, shorter in (("model", None), ("best", [_figure(run.best) for run in found]), ("method", None)):
        if _table_width(columns) > text_width():
            columns = {key: cells for key, cells in columns.items() if key != name or shorter is not None}
            columns |= {} if shorter is None else {name: shorter}
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    print_table(
        list(columns), rows, styles=["dim" if run.never_began else _STYLES.get(run.status, "") for run in found]
    )
    for run in found:
        if said := run.message or "; ".join(run.notes):
            print_note(f"{run.name}: {said}")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table_width(columns: Mapping[str, list[str]]) -> int:
    """Return how many characters a table is wide whose cells aren't folded."""
    return sum(max(map(len, [name, *cells])) for name, cells in columns.items()) + 2 * (len(columns) - 1)


def plot(
    paths: _Runs, metrics: _Metrics = None, output: _Output = None, log: _Log = False, as_json: _Json = False
) -> None:
    """Draw the curves of runs: `rlhf plot runs/a`, or `rlhf plot runs/a runs/b --metric loss,eval_loss --output ab.png`.

    Several runs are drawn on common axes, each in a colour of its own, and each metric in a line style. Evaluations have a mark
    at each point, and in a picture an error bar where their standard error is known. A curve of more than 200 steps is drawn as
    means over bins. Pictures need matplotlib (the extra `plot`).
    """
    with quick_imports():
        from rlhf_core.evaluation.report.chart_files import require_drawable, write_chart_file
        from rlhf_core.evaluation.report.curve_charts import default_metrics, metrics_chart
        from rlhf_core.evaluation.report.run_files import read_curves
        from rlhf_core.evaluation.report.write import distinct_names
    if output is not None:
        require_drawable(output)
    for path in paths:
        require_run(path)
    found = [read_curves(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]
    groups = [_names(group) for group in metrics or []] or [default_metrics(found)]
    if not all(groups):
        what = "no metric is named" if metrics else "no step has been made yet"
        raise ConfigError(what, place="--metric" if metrics else str(paths[0]), fix="name one, such as loss")
    if as_json:
        return print_json(_values(found, groups))
    charts = [metrics_chart(found, group, log=log) for group in groups]
    if output is not None:
        return print_text(str(write_chart_file(charts, output)))
    from rlhf_core.cli.terminal_plot import plot_lines

    size = get_terminal_size()
    for number, chart in enumerate(charts):
        height = max(min(20, (size.lines - 6)), 8)
        for line in plot_lines(chart, width=size.columns, height=height, colours=_shows_colours()):
            print(line)
        if number + 1 < len(charts):
            print()
    return None


def _names(group: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in group.split(",") if name.strip()))


def _values(found: list[RunHistory], groups: list[list[str]]) -> dict[str, Any]:
    """Return the values of metrics by run: steps and values of each."""
    names = dict.fromkeys(name for group in groups for name in group)
    made: dict[str, Any] = {}
    for run in found:
        made[run.name] = {}
        for name in names:
            if name in run.curves:
                points = list(zip(run.curves[name].steps, run.curves[name].values, strict=True))
            else:
                points = [(one.step, one.metrics[name]) for one in run.evaluations if name in one.metrics]
            made[run.name][name] = {"steps": [step for step, _ in points], "values": [value for _, value in points]}
    return made


def _shows_colours() -> bool:
    """Return whether stdout is a terminal that shows colours and braille."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return False
    return encodable("⣿") == "⣿"


def diff(first: _Run, second: _Run, as_json: _Json = False) -> None:
    """Show how two runs differ: options, data and models by their hashes, rewards, versions and machine, changes at resumes.

    `–` stands for what a run doesn't have. Directories (`output`) always differ, and aren't shown; `rlhf report A B` sets the
    results of two runs beside each other.
    """
    with quick_imports():
        from rlhf_core.evaluation.report.write import distinct_names
        from rlhf_core.evaluation.run_differences import run_differences
    found = run_differences(first, second)
    if as_json:
        return print_json([one.as_dict() for one in found])
    if not found:
        return print_text("no differences: the same options, data, models and versions")
    names = distinct_names([first, second])
    for part in dict.fromkeys(one.part for one in found):
        print_heading(part)
        rows = [[one.name, _shown(one.first), _shown(one.second)] for one in found if one.part == part]
        print_table(["", *names], rows)
    return None


def _shown(value: Any) -> str:
    """Return a value as text that fits a table."""
    text = "–" if value is None else str(value)
    if isinstance(value, Mapping):
        text = ", ".join(f"{name}: {one}" for name, one in value.items()) or "with its defaults"
    return text if len(text) <= _MOST else text[: _MOST - 1] + "…"
