"""A tiny model, data of every record type, and a pipeline whose stages run in the test's own process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import RLHFOrchestrator
from rlhf_core.cli import main
from rlhf_core.pipeline.stage_command import InThisProcess
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.tiny import tiny_policy

DEFAULTS = {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "dataset": {"wrap": "none"}}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and a file of rows of each record type."""
    folder = tmp_path_factory.mktemp("made")
    tiny_policy().save_pretrained(folder / "model")
    task = ArithmeticTask("sums", terms=2, digits=1, wrong=0.0)
    for record in ("sft", "preference", "unpaired", "prompt", "reasoning"):
        rows = "".join(json.dumps(row) + "\n" for row in task.rows(record, 24))
        (folder / f"{record}.jsonl").write_text(rows)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a test, in which `model` and the files stand."""
    for item in made.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path


Pipeline = Callable[..., RLHFOrchestrator]


@pytest.fixture
def pipeline(folder: Path) -> Pipeline:
    """Return a function that makes a pipeline of stages; what it tells is in its attribute `told`."""

    def make(*stages: dict[str, Any], **keys: Any) -> RLHFOrchestrator:
        how = {key: keys.pop(key) for key in ("resume", "overwrite") if key in keys}
        told: list[str] = []
        values = {"model": "model", "output": "out", "defaults": DEFAULTS, **keys}
        if stages:
            values["stages"] = list(stages)
        made = RLHFOrchestrator(values, run=InThisProcess(main), tell=told.append, **how)
        made.told = told  # type: ignore[attr-defined]
        return made

    return make


@pytest.fixture
def recorded(folder: Path) -> Callable[[], dict[str, Any]]:
    """Return a function that returns the pipeline's record, with its stages by name."""

    def read() -> dict[str, Any]:
        values = json.loads((folder / "out/pipeline.json").read_text())
        return {**values, "stages": {stage["name"]: stage for stage in values["stages"]}}

    return read
