"""A run's directory as plain data, whatever state it is in: finished, in progress, killed, damaged or truncated.

Nothing in here raises for what a file holds. What can't be read is left out, and `RunHistory.notes` says so.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.infra.errors import ConfigError, RLHFError
from rlhf_core.infra.files import read_json
from rlhf_core.infra.near_runs import near_run
from rlhf_core.training.rollout_log import ROLLOUTS, row_of
from rlhf_core.training.sample_log import NAME as SAMPLES
from rlhf_core.training.sample_log import PromptSamples, read_samples, samples_by_prompt

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
_LONGEST_LINE = 2**24
"""Bytes of a line of metrics or events that are read at most; a longer one is damaged."""


@dataclass
class MetricCurve:
    """A metric over the steps at which it was logged, values that aren't finite left out."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        return self.values[-1]


class RolloutFigures(NamedTuple):
    """The figures of one completion of `rollouts.jsonl`, and where its line begins in the file."""

    step: int
    place: int
    row: int
    reward: float | None
    advantage: float | None
    offset: int


@dataclass(frozen=True)
class EvaluationAt:
    """The metrics of one evaluation of held-out rows."""

    step: int
    metrics: Mapping[str, float]


@dataclass
class RunHistory:
    """What a run's directory holds. What isn't there is empty."""

    path: Path
    name: str
    record: Mapping[str, Any] = field(default_factory=dict)
    """`run.json`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """`config.yaml`."""
    curves: Mapping[str, MetricCurve] = field(default_factory=dict)
    """Metric → its values over the steps; those of evaluations (`eval_…`) are in `evaluations`."""
    steps: int = 0
    """The last step with a row of metrics."""
    evaluations: Sequence[EvaluationAt] = ()
    """In the order of their steps, the last one of each."""
    events: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[PromptSamples] = ()
    """`samples.jsonl` by prompt."""
    rollouts: Sequence[RolloutFigures] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, each a sentence."""

    @property
    def running(self) -> bool:
        """Whether its record says that it is in progress."""
        return self.record.get("status") == "running"

    @property
    def method(self) -> str:
        """The method's name; empty where no file says it."""
        plugin = self.record.get("plugin")
        named = plugin.get("name") if isinstance(plugin, Mapping) else None
        return str(named or self.options.get("method") or "")

    @property
    def tokens(self) -> int:
        """Tokens of all steps that were trained on."""
        return int(math.fsum(self.curves["tokens"].values)) if "tokens" in self.curves else 0

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return math.fsum(self.curves["seconds"].values) if "seconds" in self.curves else 0.0

    def rollout_rows(self, figures: Sequence[RolloutFigures]) -> list[dict[str, Any]]:
        """Return whole rows of `rollouts.jsonl`; those that can't be read any more are left out."""
        found = []
        try:
            with (self.path / ROLLOUTS).open("rb") as file:
                for one in figures:
                    file.seek(one.offset)
                    if (row := row_of(file.readline())) is not None:
                        found.append(row)
        except OSError as error:
            self.notes.append(f"{ROLLOUTS} can't be read: {error.strerror or error}")
        return found


def is_run_directory(path: Path) -> bool:
    """Return whether a directory holds what a trainer writes."""
    return any((path / name).is_file() for name in ("run.json", METRICS))


def read_run(path: Path, name: str | None = None) -> RunHistory:
    """Return what a run's directory holds.

    Args:
        path: the directory.
        name: how the report calls it; the directory's name without it.
    """
    run = read_curves(path, name)
    run.data, run.models, run.rewards = (
        read_mapping(path / f"{part}.json", run.notes) for part in ("data", "models", "rewards")
    )
    run.prompts = _samples(run)
    run.rollouts = _rollouts(run)
    if run.notes and run.running:
        run.notes.append("The run is in progress; a file that it is writing may be whole a moment later.")
    return run


def read_curves(path: Path, name: str | None = None) -> RunHistory:
    """Return the record, options, metrics, events and evaluations of a run; the arguments are those of `read_run`."""
    run = RunHistory(path, name or path.resolve().name)
    run.record = read_mapping(path / "run.json", run.notes, required=True)
    run.options = read_yaml_mapping(path / "config.yaml", run.notes)
    _read_metrics(run)
    run.events = list(read_rows(path / EVENTS, run.notes))
    run.evaluations = _evaluations(run)
    return run


def read_mapping(path: Path, notes: list[str], *, required: bool = False) -> dict[str, Any]:
    """Return the values of a JSON file; {} with a note where it is damaged, or missing and required."""
    if not path.is_file():
        if required:
            notes.append(f"{path.name} is missing.")
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError, RLHFError) as error:
        notes.append(f"{path.name} is damaged and left out: {error}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} is damaged and left out: it holds no mapping")
        return {}
    return found


def read_yaml_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the values of a YAML file; {} where it is missing, or with a note where it is damaged."""
    if not path.is_file():
        return {}
    try:
        return load_yaml(path)[0]
    except (RLHFError, OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} is damaged and left out: {error}")
        return {}


def read_text(path: Path, notes: list[str], most: int = 200_000) -> str:
    """Return a text file's content, at most so many characters; empty where it is missing or, with a note, can't be read."""
    if not path.is_file():
        return ""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(most)
    except OSError as error:
        notes.append(f"{path.name} can't be read: {error.strerror or error}")
        return ""


def read_rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file; lines that are none are left out, and noted at the end.

    A last line without its end is neither: it is being written, or a kill left it.
    """
    for _, row in _rows_with_offsets(path, notes, _json_row, longest=_LONGEST_LINE):
        yield row


def _rows_with_offsets(
    path: Path, notes: list[str], row_of: Callable[[bytes], dict[str, Any] | None], *, longest: int = -1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a JSONL file as `read_rows` does, each with the offset of its line.

    Args:
        row_of: returns the row on a line; None where it is none.
        longest: bytes of a line that are read; -1 reads all.
    """
    if not path.is_file():
        return
    damaged: list[int] = []
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(longest), b""), 1):
                if not line.endswith(b"\n"):
                    break
                row = row_of(line)
                if row is None:
                    damaged.append(number)
                else:
                    yield offset, row
                offset += len(line)
    except OSError as error:
        notes.append(f"{path.name} can't be read: {error.strerror or error}")
    note_damage(path.name, damaged, notes)


def note_damage(name: str, damaged: Sequence[int], notes: list[str]) -> None:
    """Note the numbers of damaged lines of a file."""
    if damaged:
        shown = ", ".join(map(str, damaged[:8])) + (" …" if len(damaged) > 8 else "")
        notes.append(f"{name}: damaged and left out: line{'s' * (len(damaged) > 1)} {shown}.")


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number_of(value: Any) -> float | None:
    """Return a JSON value as a number; None where it is none."""
    return float(value) if is_number(value) else None


def _json_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _read_metrics(run: RunHistory) -> None:
    """Read `metrics.jsonl` into `curves` and `steps`."""
    curves: dict[str, MetricCurve] = {}
    if not (run.path / METRICS).is_file():
        run.notes.append(f"{METRICS} is missing: no step has been made, or the file was removed.")
    unknown: dict[str, int] = {}
    for row in read_rows(run.path / METRICS, run.notes):
        step = row.get("step")
        if type(step) is not int:
            continue
        run.steps = max(run.steps, step)
        for name, value in row.items():
            if name == "step":
                continue
            if is_number(value):
                curves.setdefault(name, MetricCurve()).add(step, float(value))
            elif value is None:
                unknown[name] = unknown.get(name, 0) + 1
    for name, count in unknown.items():
        run.notes.append(
            f"`{name}` wasn't a finite number at {count} step{'s' * (count > 1)}, which its curve leaves out."
        )
    run.curves = curves


def _evaluations(run: RunHistory) -> list[EvaluationAt]:
    """Return the evaluations: of the events, which hold step 0 too, and else of the rows of metrics."""
    found: dict[int, dict[str, float]] = {}
    for name, curve in run.curves.items():
        if name.startswith("eval_"):
            for step, value in zip(curve.steps, curve.values, strict=True):
                found.setdefault(step, {})[name] = value
    for event in run.events:
        metrics, made = event.get("metrics"), event.get("step")
        if event.get("event") == "evaluated" and isinstance(metrics, Mapping) and type(made) is int:
            found[made] = {name: float(value) for name, value in metrics.items() if is_number(value)}
    run.curves = {name: curve for name, curve in run.curves.items() if not name.startswith("eval_")}
    return [EvaluationAt(step, found[step]) for step in sorted(found)]


def _samples(run: RunHistory) -> list[PromptSamples]:
    path = run.path / SAMPLES
    if not path.is_file():
        return []
    try:
        rows, damaged = read_samples(path)
    except RLHFError as error:
        run.notes.append(f"{SAMPLES} can't be read: {error}")
        return []
    note_damage(SAMPLES, damaged, run.notes)
    return samples_by_prompt(rows)


def _rollouts(run: RunHistory) -> list[RolloutFigures]:
    """Return the figures of every kept completion; texts stay in the file, which may be large."""
    found = []
    for offset, row in _rows_with_offsets(run.path / ROLLOUTS, run.notes, row_of):
        reward, advantage = number_of(row["reward"]), number_of(row.get("advantage"))
        found.append(RolloutFigures(row["step"], row["place"], row["row"], reward, advantage, offset))
    return found


def require_readable(path: Path) -> None:
    """Refuse a path that is no directory.

    Raises:
        ConfigError: says what it is.
    """
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "no such directory"
        fix = near_run(path, pipelines=True) or "give the directory of a run or of a pipeline"
        raise ConfigError(what, place=str(path), fix=fix)
