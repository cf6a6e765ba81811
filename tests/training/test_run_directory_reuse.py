"""A run that failed before its first step leaves nothing that a second try would have to be told about."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.errors import StorageError
from rlhf_core.training.run_directory import RunDirectory


def failed(path: Path, *, step: int) -> None:
    run = RunDirectory.open(path, resume=False, overwrite=False)
    run.write_text("config.yaml", "method: sft\n")
    run.end("failed", 2, step=step, message="a mistake")
    run.close()


def test_a_mistake_before_the_first_step_costs_nothing(tmp_path: Path) -> None:
    failed(tmp_path / "run", step=0)
    again = RunDirectory.open(tmp_path / "run", resume=False, overwrite=False)
    assert not again.continued and not (tmp_path / "run/config.yaml").exists()
    again.close()


@pytest.mark.parametrize("left", ["step", "checkpoints", "metrics"])
def test_what_was_trained_is_asked_about(tmp_path: Path, left: str) -> None:
    failed(tmp_path / "run", step=3 if left == "step" else 0)
    if left == "checkpoints":
        (tmp_path / "run/checkpoints").mkdir()
    if left == "metrics":
        (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(StorageError, match="holds an earlier run"):
        RunDirectory.open(tmp_path / "run", resume=False, overwrite=False)


def test_a_run_that_is_still_marked_as_running_is_asked_about(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path / "run", resume=False, overwrite=False).close()
    with pytest.raises(StorageError, match="holds an earlier run"):
        RunDirectory.open(tmp_path / "run", resume=False, overwrite=False)
