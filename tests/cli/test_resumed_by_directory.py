"""`rlhf train RUN_DIR --resume`: a run's directory stands for its own configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main
from rlhf_core.infra.files import read_json
from rlhf_core.testing.tiny import save_tiny


def test_a_run_is_made_longer_by_its_directory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model")
    rows = [{"prompt": f"{number}+1=", "response": str(number + 1)} for number in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    asked = ["--model", "model", "--data", "rows.jsonl", "--output", "run", "--max_steps", "2", "--batch_size", "2"]
    assert main(["train", "sft", *asked]) == 0
    assert main(["train", "run", "--max_steps", "3"]) == 2
    assert "run: is a run's directory; fix: `--resume` continues that run" in capsys.readouterr().err
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["train", "moved", "--resume", "--learning_rate", "3e-4"]) == 2
    assert "`--allow-change learning_rate` takes the new values from here on" in capsys.readouterr().err
    changed = ["--learning_rate", "3e-4", "--allow-change", "learning_rate, batch_size"]
    assert main(["train", "moved", "--resume", *changed]) == 2
    assert "`batch_size` can't change in a run" in capsys.readouterr().err
    assert (
        main(["train", "moved", "--resume", "--max-steps", "3", *changed[:2], "--allow-change", "learning_rate"]) == 0
    )
    record = read_json(tmp_path / "moved/run.json")
    assert (record["status"], record["step"], sorted(record["changes"][0]["options"])) == (
        "done", 3, ["learning_rate", "max_steps"],
    )  # fmt: skip
    assert not (tmp_path / "run").exists()
    assert main(["train", "sft", *asked, "--overwrite", "--allow-change", "learning_rate"]) == 2
    assert "options of a run change where it is resumed" in capsys.readouterr().err


def test_a_resume_that_finds_no_model_leaves_the_record_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n' * 4)
    monkeypatch.chdir(tmp_path)
    asked = ["--model", "model", "--data", "rows.jsonl", "--output", "run", "--max_steps", "1", "--batch_size", "2"]
    assert main(["train", "sft", *asked]) == 0
    before = (tmp_path / "run/run.json").read_bytes()
    for moved, code in (("model", 4), ("rows.jsonl", 3)):
        (tmp_path / moved).rename(tmp_path / "elsewhere")
        assert main(["train", "run", "--resume", "--max_steps", "2"]) == code
        (tmp_path / "elsewhere").rename(tmp_path / moved)
        assert (tmp_path / "run/run.json").read_bytes() == before
    capsys.readouterr()
    assert main(["train", "run", "--resume", "--max_steps", "2"]) == 0


def test_a_run_of_objects_in_python_is_continued_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(
        "method: sft\nmodel: <PolicyModel>\ndata: <list of 8>\neval_data: rows.jsonl\n"
    )
    assert main(["train", str(tmp_path), "--resume"]) == 2
    assert capsys.readouterr().err == (
        f"error[config] {tmp_path}: the run was started in Python from objects, not from files: `model`, `data`; fix: continue it"
        " by `trainer.train(resume=True)` in the program that made them, or train its `model/` in a new run\n"
    )
