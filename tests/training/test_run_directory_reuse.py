"""A run that failed before its first step leaves nothing that a second try would have to be asked about."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import toy

from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.training.run_directory import RunDirectory, output_state, refuse_inputs_inside


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


@pytest.mark.parametrize("read", ["model", "data", "replay"])
def test_a_run_does_not_remove_what_it_reads(read: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "rows.jsonl").write_text("{}\n")
    failed(tmp_path / "other", step=1)
    options = {"model": str(tmp_path / "run" / "model"), "data": [str(tmp_path / "run" / "rows.jsonl")]}
    options |= {"replay": str(tmp_path / "run"), "output": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=f"`?{read}`?: lies in the run directory"):
        refuse_inputs_inside(tmp_path / "run", {read: options[read], "output": options["output"], "method": "sft"})
    refuse_inputs_inside(tmp_path / "other", options)
    refuse_inputs_inside(tmp_path / "new", options)


def test_overwriting_the_run_whose_model_is_trained_further_is_refused(tmp_path: Path) -> None:
    toy(tmp_path, max_steps=1).train()
    again = toy(tmp_path, max_steps=1)
    again.model = tmp_path / "model"
    with pytest.raises(ConfigError, match="lies in the run directory"):
        again.train(overwrite=True)
    assert (tmp_path / "model").is_dir() and (tmp_path / "metrics.jsonl").is_file()


LEFT_BEHIND = [".probe-123", ".run.json.tmp", ".status.json.tmp", "run.lock"]
"""What a kill may leave before there is a record of the run."""


@pytest.mark.parametrize("left", LEFT_BEHIND)
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=["start", "resume", "overwrite"])
def test_what_a_kill_left_is_no_content(tmp_path: Path, left: str, how: dict[str, bool]) -> None:
    (tmp_path / left).write_bytes(b"half")
    assert toy(tmp_path, max_steps=1).train(**how).step == 1
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("left", [*LEFT_BEHIND, ".config.yaml.tmp", ".model.tmp", ".model.old", ".model_value.tmp"])
@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_a_run_with_leftovers_is_continued_and_replaced(tmp_path: Path, left: str, how: dict[str, bool]) -> None:
    toy(tmp_path, max_steps=1).train()
    if left.startswith(".model"):
        (tmp_path / left).mkdir()
    (tmp_path / left / "file" if left.startswith(".model") else tmp_path / left).write_bytes(b"half")
    assert toy(tmp_path, max_steps=1).train(**how).step == 1
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "foreign", [".notes.tmp", ".thesis.tex.old", ".probe-me", "probe-1", ".tmp-notes", ".run.json"]
)
def test_hidden_files_of_others_are_left_alone(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).write_text("years of work")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(StorageError, match="not a run's directory"):
            toy(tmp_path).train(**how)
    assert [path.name for path in tmp_path.iterdir()] == [foreign]


def test_a_run_that_is_still_marked_as_running_is_asked_about(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path / "run", resume=False, overwrite=False).close()
    with pytest.raises(StorageError, match="holds an earlier run"):
        RunDirectory.open(tmp_path / "run", resume=False, overwrite=False)


def test_what_a_run_would_do_with_its_directory_is_told_before(tmp_path: Path) -> None:
    def state(path: Path, *, resume: bool = False, overwrite: bool = False) -> str:
        return output_state(path, resume=resume, overwrite=overwrite)

    run, file = tmp_path / "run", tmp_path / "file"
    file.touch()
    assert (state(run), state(run, resume=True)) == ("new", "new")
    with pytest.raises(StorageError, match="is a file, not a directory"):
        state(file)
    with pytest.raises(StorageError, match="is not empty and not a run's directory"):
        state(tmp_path, overwrite=True)
    held = RunDirectory.open(run, resume=False, overwrite=False)
    assert state(run, resume=True).startswith("a run is at work there")
    held.end("failed", 3, step=0, message="a mistake in a row")
    held.close()
    assert state(run) == "a run that failed before its first step, replaced"
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert state(run) == "holds an earlier run: needs --resume or --overwrite"
    assert (state(run, resume=True), state(run, overwrite=True)) == ("continued", "replaced")
    (run / "run.json").write_text("{")
    with pytest.raises(StorageError, match="can't be read as a run's record"):
        state(run, resume=True)
