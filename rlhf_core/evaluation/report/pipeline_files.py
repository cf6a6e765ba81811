"""A pipeline's directory as plain data: its stages, and what each of them left in its own directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.evaluation.report.run_files import (
    RunHistory,
    is_run_directory,
    read_mapping,
    read_rows,
    read_run,
    read_text,
    read_yaml_mapping,
)

RECORD = "pipeline.json"
MOST_TREES = 6
"""Search trees that are read of a stage's sampled rows."""
_MOST_ROWS = 2_000
"""Sampled rows that are looked through."""
MOST_SAMPLES = 6
"""Sampled rows that are kept of a stage to be shown."""


@dataclass
class StageHistory:
    """One stage of a pipeline. What isn't there is empty."""

    values: Mapping[str, Any]
    """As `pipeline.json` has it."""
    path: Path | None = None
    run: RunHistory | None = None
    """Of a trainer's stage."""
    rounds: Sequence[RunHistory] = ()
    """The runs of a stage that trains in rounds."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """`evaluation.json`."""
    comparison: Mapping[str, Any] = field(default_factory=dict)
    """`comparison.json`."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Some sampled rows."""
    trees: list[tuple[str, Any]] = field(default_factory=list)
    """(where it was found, the tree) of some sampled rows."""
    sampled: int = 0
    """Sampled rows that were looked through."""
    merge: Mapping[str, Any] = field(default_factory=dict)
    """`merge.yaml`."""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.values.get("name") or (self.path.name if self.path else "stage"))

    @property
    def status(self) -> str:
        return str(self.values.get("status") or "unknown")

    def text(self, key: str) -> str:
        """Return a value of the stage as text; empty where it has none."""
        value = self.values.get(key)
        return "" if value is None else str(value)


@dataclass
class PipelineHistory:
    """What a pipeline's directory holds."""

    path: Path
    name: str
    record: Mapping[str, Any] = field(default_factory=dict)
    """`pipeline.json`, without its stages."""
    stages: list[StageHistory] = field(default_factory=list)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """`recipe.yaml`."""
    events: list[Mapping[str, Any]] = field(default_factory=list)
    """`history.jsonl`."""
    notes: list[str] = field(default_factory=list)


def is_pipeline_directory(path: Path) -> bool:
    """Return whether a directory is a pipeline's: its record is there, or its stages where that was lost."""
    return (path / RECORD).is_file() or (path / "stages").is_dir()


def read_pipeline(path: Path, name: str | None = None) -> PipelineHistory:
    """Return what a pipeline's directory holds."""
    pipeline = PipelineHistory(path, name or path.resolve().name)
    record = read_mapping(path / RECORD, pipeline.notes, required=True)
    pipeline.record = {key: value for key, value in record.items() if key != "stages"}
    pipeline.recipe = read_yaml_mapping(path / "recipe.yaml", pipeline.notes)
    pipeline.events = list(read_rows(path / "history.jsonl", pipeline.notes))
    known: set[Path] = set()
    stages = record.get("stages", [])
    if not isinstance(stages, list):
        pipeline.notes.append(f"{RECORD}: `stages` is no list, and left out.")
        stages = []
    for values in stages:
        if not isinstance(values, Mapping):
            pipeline.notes.append(f"{RECORD}: a stage is no mapping, and left out.")
            continue
        pipeline.stages.append(read_stage(path, values))
        if (own := pipeline.stages[-1].path) is not None:
            known.add(own)
    for own in sorted((path / "stages").glob("*/")) if not record else []:
        if own.is_dir() and own.resolve() not in known:
            pipeline.stages.append(read_stage(path, {"name": own.name, "directory": str(own.relative_to(path))}))
    return pipeline


def read_stage(root: Path, values: Mapping[str, Any]) -> StageHistory:
    """Return a stage with what its directory holds.

    Args:
        root: the pipeline's directory, outside of which nothing is read.
        values: of the stage in `pipeline.json`.
    """
    stage = StageHistory(values)
    directory = values.get("directory")
    if not isinstance(directory, str) or not directory:
        return stage
    path = (root / directory).resolve()
    if not path.is_relative_to(root.resolve()):
        stage.notes.append(f"{directory} is outside of the pipeline's directory, and not read.")
        return stage
    stage.path = path
    if not path.is_dir():
        if stage.status not in ("waiting", "skipped"):
            stage.notes.append(f"The stage's directory {directory} is missing.")
        return stage
    if is_run_directory(path):
        stage.run = read_run(path, stage.name)
    rounds = [one / "train" for one in sorted(path.glob("round-*")) if is_run_directory(one / "train")]
    stage.rounds = [read_run(one, f"{stage.name}, {one.parent.name}") for one in rounds]
    stage.evaluation = read_mapping(path / "evaluation.json", stage.notes)
    stage.comparison = read_mapping(path / "comparison.json", stage.notes)
    _read_samples(stage, path)
    for place in (path / "merge.yaml", path / "model" / "merge.yaml"):
        stage.merge = stage.merge or read_yaml_mapping(place, stage.notes)
    return stage


def _read_samples(stage: StageHistory, path: Path) -> None:
    """Read some sampled rows and search trees, of the files of rows that no trainer writes."""
    if stage.run is not None:
        return
    for file in sorted(path.glob("*.jsonl")):
        if file.name in ("history.jsonl", "events.jsonl"):
            continue
        for number, row in enumerate(read_rows(file, stage.notes), 1):
            if number > _MOST_ROWS:
                break
            stage.sampled += 1
            if len(stage.samples) < MOST_SAMPLES and ("completion" in row or "completions" in row):
                stage.samples.append({**row, "_place": f"{file.name}, row {number}"})
            details = row.get("details")
            for one in details if isinstance(details, list) else [details]:
                if isinstance(one, Mapping) and "tree" in one and len(stage.trees) < MOST_TREES:
                    stage.trees.append((f"{file.name}, row {number}", one["tree"]))


def merge_card(stage: StageHistory) -> str:
    """Return the model card that a merge wrote, which names the inputs with their fingerprints; empty without one."""
    if stage.path is None or not stage.merge:
        return ""
    for place in (stage.path / "README.md", stage.path / "model" / "README.md"):
        if card := read_text(place, stage.notes, 20_000):
            return card
    return ""
