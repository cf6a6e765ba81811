"""The evaluations of held-out rows in a run, or in two: before and after with 95 % intervals, and over the steps."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlhf_core.evaluation.report.blocks import Block, Cell, Section, Table
from rlhf_core.evaluation.report.chart_data import Interval, Intervals, Line, LineChart
from rlhf_core.evaluation.report.measured_values import MeasuredValue, measured
from rlhf_core.evaluation.report.page_charts import PageCharts
from rlhf_core.evaluation.report.run_files import RunHistory
from rlhf_core.evaluation.report.section_texts import titled

_ERROR, _PREFIX = "_se", "eval_"
_MOST_CHARTS, _MOST_INTERVALS = 12, 40
Measurements = Mapping[str, MeasuredValue]


def evaluation_section(runs: Sequence[RunHistory], drawing: PageCharts) -> Section:
    """Return the first and the last evaluation of a run, or the last ones of two runs, and all of them over the steps."""
    blocks = _before_and_after(runs[0], drawing) if len(runs) == 1 else _side_by_side(runs, drawing)
    by_run = {run.name: [(one.step, measurements(one.metrics)) for one in run.evaluations] for run in runs}
    names = dict.fromkeys(name for found in by_run.values() for _, values in found for name in values)
    charts = [chart for name in names if (chart := _over_steps(name, by_run)) is not None]
    return titled("Evaluation", [*blocks, *drawing.pictures(charts[:_MOST_CHARTS])])


def measurements(metrics: Mapping[str, float]) -> dict[str, MeasuredValue]:
    """Return an evaluation's metrics with the intervals of their standard errors (`NAME_se`), by name without `eval_`."""
    found = {}
    for name, value in metrics.items():
        if name.endswith(_ERROR) and name.removesuffix(_ERROR) in metrics:
            continue
        one = measured({"value": value, "error": metrics.get(name + _ERROR)})
        if one is not None:
            found[name.removeprefix(_PREFIX)] = one
    return found


def _before_and_after(run: RunHistory, drawing: PageCharts) -> list[Block]:
    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    if first.step == last.step:
        return _compared({f"step {last.step:,}": measurements(last.metrics)}, drawing)
    columns = {f"step {one.step:,}": measurements(one.metrics) for one in (first, last)}
    return _compared(columns, drawing, "change", paired=True)


def _side_by_side(runs: Sequence[RunHistory], drawing: PageCharts) -> list[Block]:
    """Return the last evaluations of two runs; KLs to different references have no difference."""
    columns = {run.name: measurements(run.evaluations[-1].metrics if run.evaluations else {}) for run in runs}
    references = [_reference(run) for run in runs]
    apart = {"kl"} if any(one != references[0] for one in references) else set[str]()
    return _compared(columns, drawing, "difference", paired=False, apart=apart)


def _reference(run: RunHistory) -> Any:
    """Return what tells a run's reference from others: the hashes of its files, else its name."""
    model = run.models.get("reference", run.models.get("policy"))
    model = model if isinstance(model, Mapping) else {}
    return model.get("files") or model.get("source") or run.options.get("model")


def _compared(
    columns: Mapping[str, Measurements],
    drawing: PageCharts,
    change: str = "",
    *,
    paired: bool = True,
    apart: Collection[str] = (),
) -> list[Block]:
    """Return measurements as a table and, those that are shares, as a chart.

    Args:
        change: heading of the column with the difference of the two columns; empty where there is one.
        paired: whether they are of the same rows, so that the interval of the difference isn't known from theirs.
        apart: last words of the names of metrics that can't be set against each other.
    """
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows, items = [], []
    for name in names:
        values = [column.get(name) for column in columns.values()]
        cells = [Cell("–" if one is None else str(one)) for one in values]
        if change:
            alike = re.split(r"[/_]", name)[-1] not in apart
            cells.append(Cell(_difference(*values, paired=paired) if alike else "–"))
        rows.append([Cell(name), *cells])
        for label, one in zip(columns, values, strict=True):
            if one is not None and one.a_share:
                items.append(Interval(name, label, one.value, one.low, one.high))
    if not rows:
        return []
    header = ["metric", *columns, *([change] if change else [])]
    chart = [Intervals("Values from 0 to 1, with 95 % intervals", items[:_MOST_INTERVALS])] if items else []
    return [Table(header, rows, frozenset(range(1, len(header)))), *drawing.pictures(chart)]


def _difference(before: MeasuredValue | None, after: MeasuredValue | None, *, paired: bool) -> str:
    """Return after − before as text, of independent values with its 95 % interval."""
    if before is None or after is None:
        return "–"
    change = after.value - before.value
    if paired or before.low is None or before.high is None or after.low is None or after.high is None:
        return MeasuredValue(change).signed
    half = math.hypot(before.high - before.low, after.high - after.low) / 2
    return MeasuredValue(change, change - half, change + half).signed


def _over_steps(name: str, by_run: Mapping[str, Sequence[tuple[int, Measurements]]]) -> LineChart | None:
    """Return a metric over the steps; None where no run has two values of it."""
    lines = []
    for number, (run, evaluations) in enumerate(by_run.items()):
        points = [(step, values[name]) for step, values in evaluations if name in values]
        if not points:
            continue
        errors = [(one.high - one.value) for _, one in points if one.high is not None]
        lines.append(
            Line(
                run if len(by_run) > 1 else "",
                [step for step, _ in points],
                [one.value for _, one in points],
                number,
                errors=errors if len(errors) == len(points) else None,
                marks=True,
            )
        )
    return LineChart(f"Held-out {name}", lines) if any(len(line.x) > 1 for line in lines) else None
