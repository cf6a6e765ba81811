"""The runs near a path that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.cli import main
from rlhf_core.infra.near_runs import near_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/dpo", "runs/sft-first", "pipe/stages/01-sft"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "pipe" / "pipeline.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("runs/sft-frst", "did you mean `runs/sft-first`?"),
        ("sft-first", "did you mean `runs/sft-first`?"),
        ("run/sft-first", "did you mean `runs/sft-first`?"),
        ("runs/nope", "name one of the runs there: runs/dpo, runs/sft-first"),
        ("runs", "name one of the runs there: runs/dpo, runs/sft-first"),
        ("pipe", "did you mean `pipe/stages/01-sft`?"),
        ("pipe/01-sft", "did you mean `pipe/stages/01-sft`?"),
        ("elsewhere/x", None),
    ],
)
def test_the_run_that_is_meant_or_which_there_are(folder: Path, path: str, hint: str | None) -> None:
    assert near_run(Path(path)) == hint


def test_pipelines_are_meant_where_they_may_be(folder: Path) -> None:
    assert near_run(Path("pip"), pipelines=True) == "did you mean `pipe`?"
    (folder / "runs" / "dpo" / "model").mkdir()
    assert near_run(Path("runs/dpo/model")) == f"give the run's directory, {folder / 'runs' / 'dpo'}"


def test_of_many_runs_some_are_named(folder: Path) -> None:
    for number in range(10):
        (folder / "runs" / f"grpo-{number}").mkdir()
        (folder / "runs" / f"grpo-{number}" / "run.json").write_text("{}")
    hint = near_run(Path("runs/zzz"))
    assert hint is not None and hint.endswith("runs/grpo-6 and 4 more, which `rlhf runs runs` lists")


@pytest.mark.parametrize(
    "command",
    [
        "report RUN", "report runs/dpo RUN", "plot RUN", "diff RUN runs/dpo", "samples RUN", "rollouts RUN", "export RUN",
        "push RUN a/b", "train RUN --resume", "chat RUN", "serve RUN",
    ],
)  # fmt: skip
def test_every_command_that_takes_a_run_names_the_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "runs" / "dpo" / "config.yaml").write_text("method: dpo\n")
    for wrong, hint in (
        ("runs/sft-frst", "did you mean"),
        ("runs/zzz", "name one of the runs there: runs/dpo, runs/sft-first"),
    ):
        assert main(command.replace("RUN", wrong).split()) != 0
        assert hint in capsys.readouterr().err


def test_a_folder_of_runs_that_is_misspelt_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "run"]) == 2
    assert "did you mean runs?" in capsys.readouterr().err


def test_a_folder_that_must_not_be_read_gives_no_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert near_run(tmp_path / "closed" / "run") is None
