"""The run directory: whose it is, what it holds, and what never gets into it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import ROWS, ToyTrainer, toy

from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.infra import measured_choices
from rlhf_core.infra.errors import ConfigError, RLHFError, StorageError
from rlhf_core.infra.files import read_json
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible
from rlhf_core.training.run_directory import RunDirectory, record_fault


class Unloaded(ToyTrainer):
    """Fails if anything is loaded."""

    def build(self, loader: Any) -> Any:
        raise AssertionError("the model was loaded")


def refused(output: Path, **how: bool) -> RLHFError:
    trainer = toy(output, kind=Unloaded)
    with pytest.raises(RLHFError) as caught:
        trainer.train(**how)
    return caught.value


def test_what_a_run_leaves(tmp_path: Path) -> None:
    toy(tmp_path, eval_rows=ROWS[:8], checkpoint={"every": 2}).train()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        "config.input.yaml", "config.yaml", "command.txt", "run.json", "status.json", "data.json", "models.json",
        "metrics.jsonl", "events.jsonl", "checkpoints/step-6/manifest.json", "model/model.safetensors",
    } <= names  # fmt: skip
    assert not [name for name in names if "/." in f"/{name}"]
    record = read_json(tmp_path / "run.json")
    assert {
        "id",
        "started",
        "ended",
        "versions",
        "torch_build",
        "threads",
        "device",
        "git",
        "seeds",
        "plugin",
        "model",
    } <= record.keys()
    assert record["plugin"] == {"target": "toy:ToyTrainer"}
    data = read_json(tmp_path / "data.json")
    assert data["data"]["kept"] == len(ROWS) and data["eval_data"]["kept"] == 8
    assert load_yaml(tmp_path / "config.yaml")[0]["checkpoint"] == {"minutes": 10.0, "every": 2, "keep": 2}
    assert yaml.safe_load((tmp_path / "config.input.yaml").read_text())["max_steps"] == 6


def test_what_the_command_line_notes_is_kept(tmp_path: Path) -> None:
    trainer = toy(tmp_path)
    trainer.run_inputs = {
        "config_input": "method: toy\nhub_token: hf_abcdefghijklmnopqrstuv\n",
        "command": "rlhf train toy --api-key sk-0123456789abcdefghij",
        "plugin": {"name": "toy", "distribution": "toys", "version": "2"},
    }
    trainer.train()
    assert (tmp_path / "config.input.yaml").read_text() == "method: toy\nhub_token: [redacted]\n"
    assert (tmp_path / "command.txt").read_text() == "rlhf train toy --api-key [redacted]\n"
    assert load_yaml(tmp_path / "config.yaml")[0]["method"] == "toy"
    assert read_json(tmp_path / "run.json")["plugin"]["distribution"] == "toys"
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hf_abcdef" not in everything and b"sk-012345" not in everything


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = toy().train()
    assert result.output is None and result.model_dir is None and list(tmp_path.iterdir()) == []
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="no run directory is set") as caught:
            toy().train(**how)
        assert caught.value.exit_code == 2


def test_an_earlier_run_is_neither_continued_nor_replaced_unasked(tmp_path: Path) -> None:
    toy(tmp_path).train()
    error = refused(tmp_path)
    assert isinstance(error, StorageError) and error.exit_code == 7
    assert "holds an earlier run; fix: `resume=True` continues it, `overwrite=True` replaces it" in str(error)
    assert read_json(tmp_path / "run.json")["status"] == "done"


def test_both_ways_at_once_are_refused(tmp_path: Path) -> None:
    assert "either continued or replaced" in str(refused(tmp_path, resume=True, overwrite=True))


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path, how: dict[str, bool]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    error = refused(tmp_path, **how)
    assert error.exit_code == 7 and "not a run's directory" in str(error)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_replaces_a_run_and_follows_no_link(tmp_path: Path) -> None:
    output, outside = tmp_path / "run", tmp_path / "outside"
    toy(output).train()
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (output / "link").symlink_to(outside)
    toy(output, max_steps=2).train(overwrite=True)
    assert not (output / "link").exists() and (outside / "kept").exists()
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-2"]


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    assert toy(tmp_path / "new").train(resume=True).step == 6


def test_a_file_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = refused(tmp_path / "file")
    assert error.exit_code == 7 and "is a file" in str(error)
    assert refused(tmp_path / "file" / "below").exit_code == 7


def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    place = tmp_path / "locked"
    place.mkdir()
    place.chmod(0o500)
    # Permissions don't bind root; a file system of the kernel does.
    output = place / "run" if os.geteuid() else Path("/proc/run")
    if not Path("/proc").is_dir() and not os.geteuid():
        pytest.skip("nothing here refuses root")
    error = refused(output)
    assert isinstance(error, StorageError) and error.exit_code == 7 and str(output) in str(error)


def test_two_processes_cannot_work_in_one_directory(tmp_path: Path) -> None:
    held = RunDirectory.open(tmp_path, resume=False, overwrite=False)
    if sys.platform == "win32":
        pytest.skip("no such lock")
    error = refused(tmp_path, resume=True)
    assert error.exit_code == 7 and "another process is working" in str(error)
    held.close()
    assert toy(tmp_path).train(resume=True).step == 6


def test_a_failure_is_noted(tmp_path: Path) -> None:
    class Failing(ToyTrainer):
        def loss(self, batch: Any) -> Any:
            raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError):
        toy(tmp_path, kind=Failing).train()
    record = read_json(tmp_path / "run.json")
    assert (record["status"], record["exit_code"], record["message"]) == ("failed", 1, "ZeroDivisionError: oh")
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["event"] == "run_failed"


def test_the_fault_of_another_process_is_the_cause(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path, resume=False, overwrite=False)
    record_fault(tmp_path, rank=1, code=3, step=5, message="rows.jsonl:7: bad")
    directory.end("failed", 1, step=5, message="process 1 ended", consequence=True)
    assert read_json(tmp_path / "run.json")["exit_code"] == 3
    assert read_json(tmp_path / "status.json")["message"] == "process 1: rows.jsonl:7: bad"


def test_the_events_reach_listeners(tmp_path: Path, install: Any) -> None:
    install(
        "listener",
        {
            "listener.py": "from rlhf_core.registry.hooks import hookimpl\nheard = []\n"
            + "".join(
                f"@hookimpl\ndef {name}({arguments}):\n    heard.append(('{name}', {value}))\n"
                for name, arguments, value in (
                    ("run_started", "run", "run.config.max_steps"),
                    ("step_ended", "step, metrics", "step"),
                    ("evaluated", "step, metrics", "step"),
                    ("checkpoint_saved", "step, path", "path.name"),
                    ("run_ended", "result", "result.step"),
                )
            )
        },
        hooks={"listener": "listener"},
    )
    toy(tmp_path / "run", max_steps=2, eval_rows=ROWS[:8], checkpoint={"every": 1}).train()
    import listener  # type: ignore[import-not-found]

    assert listener.heard == [
        ("run_started", 2), ("step_ended", 1), ("checkpoint_saved", "step-1"), ("evaluated", 2), ("step_ended", 2),
        ("checkpoint_saved", "step-2"), ("run_ended", 2),
    ]  # fmt: skip


def test_a_run_records_which_implementations_were_measured_to_be_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measured_choices, "_made", {})
    measured_choices.note_choice("float32 products in training", "oneDNN", share_of_time=0.5, threads=1)
    toy(tmp_path, max_steps=2).train()
    made = {"float32 products in training": {"taken": "oneDNN", "share_of_time": 0.5, "threads": 1}}
    assert read_json(tmp_path / "run.json")["choices"] == made
    assert "before the run was resumed" not in caplog.text


def test_a_resumed_run_computes_with_what_its_record_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"float32 products in training": {"taken": "PyTorch", "share_of_time": 0.7, "threads": 1}}
    monkeypatch.setattr(measured_choices, "_made", record)
    monkeypatch.setattr(measured_choices, "_recorded", {})
    run = toy(tmp_path, kind=interruptible(ToyTrainer), max_steps=4, checkpoint={"every": 2})
    run.stop_after = 2
    with pytest.raises(StoppedEarly):
        run.train()
    monkeypatch.setattr(measured_choices, "_made", {})  # as in a new process
    toy(tmp_path, kind=interruptible(ToyTrainer), max_steps=4, checkpoint={"every": 2}).train(resume=True)
    what = "float32 products in training"
    assert measured_choices.follow_record(what, threads=2) is None
    assert measured_choices.follow_record(what, threads=1) == "PyTorch"
    toy(tmp_path / "new", max_steps=1).train()
    assert measured_choices.follow_record(what, threads=1) is None


def test_a_resumed_run_warns_where_another_implementation_is_taken_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measured_choices, "_made", {})
    measured_choices.note_choice("float32 products in training", "oneDNN", share_of_time=0.5)
    run = toy(tmp_path, kind=interruptible(ToyTrainer), max_steps=4, checkpoint={"every": 2})
    run.stop_after = 2
    with pytest.raises(StoppedEarly):
        run.train()
    measured_choices.note_choice("float32 products in training", "PyTorch", share_of_time=0.9)
    toy(tmp_path, kind=interruptible(ToyTrainer), max_steps=4, checkpoint={"every": 2}).train(resume=True)
    found = [record.getMessage() for record in caplog.records if "computed by PyTorch now" in record.getMessage()]
    assert found == [
        "float32 products in training: computed by PyTorch now, and by oneDNN before the run was resumed: the last bits of what"
        " it computes differ"
    ]
    assert read_json(tmp_path / "run.json")["choices"]["float32 products in training"]["taken"] == "PyTorch"
