"""The runs below a directory, each in a few figures: whether it runs, how far it is, what its evaluations say."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_core.config.metric_direction import better_when
from rlhf_core.evaluation.report.run_files import (
    EVENTS,
    METRICS,
    is_number,
    read_curves,
    read_mapping,
    read_rows,
    read_yaml_mapping,
)
from rlhf_core.evaluation.report.run_sections import moment
from rlhf_core.training.run_directory import is_at_work

Status = Literal["running", "killed", "done", "stopped", "failed", "damaged"]

_NOT_BELOW = {"checkpoints", "model", "node_modules", "__pycache__", "site-packages"}
"""Folders in which there are no runs."""
_TAIL = 1 << 18
"""Bytes at the end of `metrics.jsonl` that hold its last row."""
_WATCHED = ("eval_reward", "eval_accuracy", "eval_loss", "reward", "loss")
"""The metrics of which the first that a run has is shown, where no option names one."""


@dataclass(frozen=True)
class RunSummary:
    """One run in a few figures; what isn't known is None or empty."""

    path: Path
    name: str
    """Its directory, relative to where it was looked for."""
    status: Status
    """`running` is a run that a process works on now; `killed` one whose process ended without writing how."""
    method: str = ""
    model: str = ""
    step: int = 0
    total_steps: int | None = None
    metric: str | None = None
    """The metric of which `last` and `best` are: the one asked for, else the run's own for its best, else a usual one."""
    last: float | None = None
    best: float | None = None
    best_step: int | None = None
    started: str | None = None
    updated: float | None = None
    """When it last wrote anything, in seconds since 1970."""
    message: str | None = None
    """What it ended with, where that was a fault."""
    notes: Sequence[str] = field(default_factory=list)
    """What can't be read of its files."""

    @property
    def never_began(self) -> bool:
        """Whether it failed before its first step, so that it holds nothing that was trained."""
        return self.status == "failed" and not self.step

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {**asdict(self), "path": str(self.path)}


def find_runs(directory: Path) -> Iterator[Path]:
    """Yield the run directories below a directory, itself included, in the order of their names."""
    for folder, below, files in os.walk(directory):
        below[:] = sorted(name for name in below if name not in _NOT_BELOW and not name.startswith("."))
        if "run.json" in files:
            yield Path(folder)


def list_runs(directory: Path, metric: str | None = None) -> list[RunSummary]:
    """Return the runs below a directory, those that wrote something last first.

    Args:
        metric: whose values are shown; without it each run's own choice.
    """
    found = [summarise(path, _relative(path, directory), metric) for path in find_runs(directory)]
    return sorted(found, key=lambda run: -(run.updated or 0))


def summarise(path: Path, name: str, metric: str | None = None) -> RunSummary:
    """Return the figures of one run; nothing that is wrong with its files raises."""
    notes: list[str] = []
    record = read_mapping(path / "run.json", notes, required=True)
    if not record:
        return RunSummary(path, name, "damaged", updated=_written(path), notes=notes)
    options = read_yaml_mapping(path / "config.yaml", notes)
    events = list(read_rows(path / EVENTS, notes))
    row = _last_row(path / METRICS)
    evaluations = _evaluations(events)
    chosen = metric or _chosen(record, options, evaluations, row)
    last, best, best_step = _values(path, chosen, options, evaluations, row)
    step = row.get("step") if is_number(row.get("step")) else record.get("step")
    plugin = record.get("plugin")
    origin = plugin if isinstance(plugin, Mapping) else {}
    status = _status(path, record)
    message = record.get("message")
    return RunSummary(
        path, name, status,
        method=str(origin.get("name") or options.get("method") or origin.get("target") or ""),
        model=_model_name(str(options.get("model") or record.get("model") or "")),
        step=step if isinstance(step, int) else 0,
        total_steps=_total(options, events),
        metric=chosen, last=last, best=best, best_step=best_step,
        started=record.get("started"), updated=_written(path) if status in ("running", "killed") else _ended(path, record),
        message=str(message) if message and status == "failed" else None,
        notes=notes,
    )  # fmt: skip


def _relative(path: Path, directory: Path) -> str:
    inside = path.relative_to(directory)
    return str(inside) if inside.parts else path.resolve().name


def _status(path: Path, record: Mapping[str, Any]) -> Status:
    status = record.get("status")
    if status == "running":
        # Without locks it can't be known, and the record is believed.
        return "killed" if is_at_work(path) is False else "running"
    return status if status in ("done", "stopped", "failed") else "damaged"


def _total(options: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> int | None:
    """Return how many steps the run has in all, as it is planned now."""
    if isinstance(options.get("max_steps"), int):
        return int(options["max_steps"])
    said = [event["total_steps"] for event in events if isinstance(event.get("total_steps"), int)]
    return said[-1] if said else None


def _evaluations(events: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Return the metrics of each evaluation by its step, ascending."""
    found = {
        event["step"]: event["metrics"]
        for event in events
        if event.get("event") == "evaluated" and type(event.get("step")) is int and isinstance(event.get("metrics"), Mapping)
    }  # fmt: skip
    return dict(sorted(found.items()))


def _chosen(
    record: Mapping[str, Any],
    options: Mapping[str, Any],
    evaluations: Mapping[int, Mapping[str, Any]],
    row: Mapping[str, Any],
) -> str | None:
    """Return the metric by which a run finds its best checkpoint, or the first usual one that it has."""
    for asked in (options.get("keep_best"), options.get("early_stopping")):
        if isinstance(asked, Mapping) and isinstance(asked.get("metric"), str):
            return str(asked["metric"])
    if isinstance(record.get("best_metric"), str):
        return str(record["best_metric"])
    names = {name for metrics in evaluations.values() for name in metrics} | set(row)
    return next((name for name in _WATCHED if name in names), None)


def _model_name(model: str) -> str:
    """Return the last part of a model's path or name; of `sft/model`, as each run calls its own, the run's name as well."""
    path = Path(model)
    return f"{path.parent.name}/{path.name}" if path.name == "model" and path.parent.name else path.name


def _values(
    path: Path,
    metric: str | None,
    options: Mapping[str, Any],
    evaluations: Mapping[int, Mapping[str, Any]],
    row: Mapping[str, Any],
) -> tuple[float | None, float | None, int | None]:
    """Return a metric's last value, its best one and the step of that, as far as they are known.

    The evaluation before the first step isn't among those compared. Of loss and reward of every step, all rows of which would
    have to be read, only the last value is given.
    """
    if metric is None:
        return None, None, None
    points = [(step, metrics[metric]) for step, metrics in evaluations.items() if is_number(metrics.get(metric))]
    if not points:
        curve = read_curves(path).curves.get(metric) if metric not in _WATCHED else None
        if curve is None:
            value = row.get(metric)
            return (float(value) if is_number(value) else None), None, None
        points = list(zip(curve.steps, curve.values, strict=True))
    compared = [(step, value) for step, value in points if step] or points
    mode = _mode(options, metric)
    if mode is None:
        return points[-1][1], None, None
    step, best = (min if mode == "min" else max)(compared, key=lambda point: point[1])
    return points[-1][1], best, step


def _mode(options: Mapping[str, Any], metric: str) -> str | None:
    """Return the direction of a metric, as the run's options state it or its name tells."""
    for asked in (options.get("keep_best"), options.get("early_stopping")):
        if isinstance(asked, Mapping) and asked.get("metric") == metric and asked.get("mode") in ("min", "max"):
            return str(asked["mode"])
    return better_when(metric)


def _last_row(path: Path) -> dict[str, Any]:
    """Return the last whole row of a JSONL file; {} where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().split(b"\n")[:-1]
        found = json.loads(lines[-1])
    except (OSError, ValueError, IndexError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(path: Path) -> float | None:
    """Return when a run's logs or record were last written."""
    times = []
    for name in (METRICS, EVENTS, "run.json"):
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _ended(path: Path, record: Mapping[str, Any]) -> float | None:
    ended = moment(record.get("ended"))
    return _written(path) if ended is None else ended


def age(since: float | None, now: float | None = None) -> str:
    """Return how long ago a time was, as text: `12 s`, `5 min`, `3 h`, `2 d`."""
    if since is None:
        return ""
    seconds = max(0.0, (time.time() if now is None else now) - since)
    for most, unit, size in ((60, "s", 1), (3600, "min", 60), (86_400, "h", 3600)):
        if seconds < most:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86_400)} d"
