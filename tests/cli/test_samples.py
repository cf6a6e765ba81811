"""`rlhf samples`: completions side by side over the steps, as they are asked for, and errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.testing.tiny import save_tiny

Command = Callable[..., tuple[int, str, str]]
TEXT = "It says that three and four are seven, and goes on about it for as long as it may. "


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def row(step: int, number: int = 0, sample: int = 0, kind: str = "prompt", **other: Any) -> dict[str, Any]:
    text = f"text {step}.{number}.{sample}"
    asked = {"prompt": f"question {number}", "completion": text, "stop_reason": "end", "tokens": 5}
    return {"step": step, "kind": kind, "row": number, "sample": sample, **asked, **other}


def run_of(path: Path, rows: list[dict[str, Any]], tail: str = "") -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps({"rlhf_core": "0", "id": "a", "started": "b", "status": "running"}))
    (path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows) + tail)
    return str(path)


FIXED = [row(step, number, sample) for step in (0, 5, 10, 15) for number in (0, 1) for sample in (0, 1)]


def test_the_first_and_the_last_step_stand_side_by_side(tmp_path: Path, rlhf: Command) -> None:
    code, out, err = rlhf("samples", run_of(tmp_path / "run", FIXED))
    lines = out.splitlines()
    assert (code, err) == (0, "") and max(map(len, lines)) <= 80
    assert sum("step 0 " in line and "step 15 " in line for line in lines) == 2
    # Two completions of a prompt stand under each other.
    assert [line for line in lines if "text 0.0.0" in line and "text 15.0.0" in line]
    assert [line for line in lines if "text 0.0.1" in line and "text 15.0.1" in line]
    assert "text 5.0.0" not in out and "steps 0, 5, 10, 15" in out and "--prompt K" in lines[-1]


def test_a_wider_terminal_shows_more_steps(tmp_path: Path, rlhf: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = rlhf("samples", run_of(tmp_path / "run", FIXED))[1]
    assert [line for line in out.splitlines() if "step 0 " in line and "step 10 " in line and "step 15 " in line]
    monkeypatch.setenv("COLUMNS", "40")
    out = rlhf("samples", run_of(tmp_path / "run", FIXED))[1]
    assert "step 15 " in out and "step 0 " not in out and max(map(len, out.splitlines())) <= 40


def test_one_prompt_is_shown_whole_and_at_every_step(tmp_path: Path, rlhf: Command) -> None:
    rows = [row(step, completion=TEXT * 10) for step in (0, 5, 10)] + [row(0, 1)]
    path = run_of(tmp_path / "run", rows)
    short, whole = rlhf("samples", path)[1], rlhf("samples", path, "--prompt", "1")[1]
    assert "more lines" in short and "more lines" not in whole and "question 1" not in whole
    assert all(f"step {step} " in whole for step in (0, 5, 10)) and "step 5 " not in short
    assert "".join(whole.split()).count("threeandfour") < 30  # wrapped among the columns' borders
    assert whole.count("three") == 30


def test_steps_and_the_newest_can_be_chosen(tmp_path: Path, rlhf: Command) -> None:
    path = run_of(tmp_path / "run", FIXED)
    out = rlhf("samples", path, "--step", "5", "--step", "10")[1]
    assert "text 5.0.0" in out and "text 10.1.1" in out and "text 0.0.0" not in out
    out = rlhf("samples", path, "--last")[1]
    assert "text 15.1.1" in out and "text 0.0.0" not in out


def test_scores_of_an_online_run_are_shown(tmp_path: Path, rlhf: Command) -> None:
    scores: list[dict[str, Any]] = [
        row(step, number, kind=kind, reward=step + 0.5, rewards={"exact": float(step), "format": 0.5})
        for step, number, kind in (
            (0, 7, "evaluation"), (0, 3, "rollout"), (4, 9, "rollout"), (8, 7, "evaluation"),
        )
    ]  # fmt: skip
    path = run_of(tmp_path / "run", scores)
    out = rlhf("samples", path)[1]
    assert "held-out row 7" in out and "rollout of row 9" in out
    assert "reward 8.5 (exact 8, format 0.5)" in " ".join(out.replace("│", " ").split())
    assert "row 3" not in out  # of rollouts, the newest
    assert "rollout of row 3" in rlhf("samples", path, "--step", "0")[1]
    assert [one["step"] for one in json.loads(rlhf("samples", path, "--json", "--last")[1])] == [8, 4]


def test_json_has_the_rows_as_they_are(tmp_path: Path, rlhf: Command) -> None:
    path = run_of(tmp_path / "run", FIXED)
    everything = json.loads(rlhf("samples", path, "--json")[1])
    assert sorted(everything, key=lambda one: (one["step"], one["row"], one["sample"])) == FIXED
    assert json.loads(rlhf("samples", path, "--json", "--prompt", "2", "--step", "5")[1]) == [
        row(5, 1, 0),
        row(5, 1, 1),
    ]


def test_a_run_in_progress_and_damaged_lines(tmp_path: Path, rlhf: Command) -> None:
    path = run_of(tmp_path / "run", FIXED[:2], tail='{"step": 5, "ki')
    code, out, err = rlhf("samples", path)
    assert (code, err) == (0, "") and "text 0.0.0" in out
    path = run_of(tmp_path / "run", FIXED[:2], tail="what?\n")
    code, _, err = rlhf("samples", path)
    assert code == 0 and "samples.jsonl: damaged and left out: line 3" in err


def test_what_a_model_says_does_not_act_on_the_terminal(tmp_path: Path, rlhf: Command) -> None:
    rows = [row(0, prompt="[red]a", completion="\x1b[2J\x07 [bold]b[/bold] :smile: \u202e"), row(1, completion="")]
    out = rlhf("samples", run_of(tmp_path / "run", rows))[1]
    assert not {"\x1b", "\x07", "\u202e"} & {*out} and "[red]a" in out and "[bold]b[/bold] :smile:" in out
    assert "(empty)" in out


def test_chats_show_who_says_what(tmp_path: Path, rlhf: Command) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    out = rlhf("samples", run_of(tmp_path / "run", [row(0, prompt=chat)]))[1]
    assert "system: Be brief." in out and "user: Why?" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none"], 7, "none: no such directory"),
        (["runs"], 7, "runs: is not a run's directory; fix: "),
        (["runs/whole/samples.jsonl"], 7, "is a file; fix: give the run's directory, "),
        (["runs/empty"], 2, "the run has no samples; fix: "),
        (["runs/whole", "--prompt", "3"], 2, "--prompt: there is no such prompt; got 3; fix: use 1 to 2"),
        (["runs/whole", "--step", "6"], 2, "--step: no samples of this step; got 6; fix: use one of 0, 5, 10, 15"),
        (["runs/whole", "--step", "5", "--last"], 2, "choose one"),
        ([], 2, "missing argument"),
    ],
)
def test_errors_say_what_to_do(
    tmp_path: Path, rlhf: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(Path("runs/whole"), FIXED)
    run_of(Path("runs/empty"), [])
    found, out, err = rlhf("samples", *arguments)
    assert found == code and out == "" and message in err and err.count("\n") == 1
    if arguments == ["runs/empty"]:
        assert "--logging.samples.prompts" in err
    if arguments == ["runs"]:
        assert "runs/whole" in err


def test_from_the_flags_of_a_run_to_what_it_said(tmp_path: Path, rlhf: Command) -> None:
    """A prompt with a colon, which YAML reads as a mapping, is a text; so is one that is a number."""
    model, data, output = save_tiny(tmp_path / "model", layers=1, hidden=32), tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": f"{n}", "response": "ab"}) + "\n" for n in range(8)))
    asked = ["--logging.samples.prompts", "Question: why?", "--logging.samples.prompts", "42"]
    options = ["--max_steps", "2", "--logging.samples.every", "1", "--logging.samples.generation.max_new_tokens", "4"]
    paths = ["--model", str(model), "--data", str(data), "--output", str(output), "--dataset.wrap", "none"]
    assert "# logging.samples: 2 prompts" in rlhf("train", "sft", *paths, *asked, *options, "--dry-run")[1]
    assert rlhf("train", "sft", *paths, *asked, *options)[0] == 0
    code, out, _ = rlhf("samples", str(output), "--prompt", "1")
    assert code == 0 and "Question: why?" in out and all(f"step {step} " in out for step in (0, 1, 2))
    rows = json.loads(rlhf("samples", str(output), "--json", "--last")[1])
    assert [row["prompt"] for row in rows] == ["Question: why?", "42"]
