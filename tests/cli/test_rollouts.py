"""`rlhf rollouts`: groups of a rollout, best and worst first, a page at a time, and errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def group(step: int, row: int, rewards: list[float | None]) -> list[dict[str, Any]]:
    """Return the rows of a group, one per reward; those of the last rollout weren't trained on."""
    return [
        {
            "step": step, "row": row, "place": 100 * step + row, "sample": number, "prompt": f"question {row}",
            "completion": f"text {step}.{row}.{number}", "stop_reason": "length", "tokens": 1, "reward": reward,
            "rewards": {} if reward is None else {"exact": reward, "form": 0.0},
            "advantage": 1.5 - number if step else None, "logprob_gap": 2e-6 if step else None,
        }
        for number, reward in enumerate(rewards)
    ]  # fmt: skip


def run_of(path: Path, groups: list[list[dict[str, Any]]], tail: str = "") -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps({"rlhf_core": "0", "id": "a", "started": "b", "status": "running"}))
    lines = [json.dumps(row) + "\n" for rows in groups for row in rows]
    (path / "rollouts.jsonl").write_text("".join(lines) + tail)
    return str(path)


ROLLOUTS = [group(0, 3, [0.0, 1.0]), *(group(8, row, [row / 4, 0.1, 0.2]) for row in (1, 4, 2))]


def test_the_newest_rollout_is_shown_best_group_first_with_its_best_and_worst_completion(
    tmp_path: Path, rlhf: Command
) -> None:
    code, out, err = rlhf("rollouts", run_of(tmp_path / "run", ROLLOUTS, '{"step": 9'))
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    assert out.index("row 4") < out.index("row 2") < out.index("row 1") and "row 3" not in out
    out = " ".join(out.split())
    assert "reward 1 (exact 1, form 0), advantage +1.5, gap 2.0e-06, 1 token, cut off by the limit" in out
    assert out.index("text 8.4.0") < out.index("text 8.4.1") and "text 8.4.2" not in out
    assert "3 completions, reward 0.433 (0.1 to 1)" in out and "rollouts of steps 0, 8" in out


def test_the_worst_come_first_and_a_page_at_a_time(tmp_path: Path, rlhf: Command) -> None:
    run = run_of(tmp_path / "run", ROLLOUTS)
    out = " ".join(rlhf("rollouts", run, "--worst", "--groups", "2")[1].split())
    assert out.index("row 1") < out.index("row 2") and "row 4" not in out and "page 1 of 2, 3 groups" in out
    assert "More: --page 2" in out
    out = rlhf("rollouts", run, "--worst", "--groups", "2", "--page", "2", "--all")[1]
    assert "text 8.4.2" in out and "row 1" not in out and "--page 3" not in out
    code, _, err = rlhf("rollouts", run, "--page", "7")
    assert code == 2 and "there is no such page" in err and "use 1 to 1" in err


def test_of_a_chat_the_last_message_is_shown_and_all_of_them_with_all(tmp_path: Path, rlhf: Command) -> None:
    rows = group(8, 1, [1.0, 0.0])
    turns = [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2 + 2?")]
    for row in rows:
        row["prompt"] = [{"role": role, "content": text} for role, text in turns]
    run = run_of(tmp_path / "run", [rows])
    lines = [line.strip() for line in rlhf("rollouts", run)[1].splitlines()]
    assert lines[1:3] == ["… 3 earlier messages", "And 2 + 2?"]
    lines = [line.strip() for line in rlhf("rollouts", run, "--all")[1].splitlines()]
    assert lines[1:5] == [f"{role}: {text}" for role, text in turns]


def test_steps_and_rows_are_chosen_and_printed_as_json(tmp_path: Path, rlhf: Command) -> None:
    run = run_of(tmp_path / "run", [*ROLLOUTS, group(8, 3, [None, None])])
    assert "not trained on" in rlhf("rollouts", run, "--step", "0")[1]
    out = rlhf("rollouts", run, "--row", "3")[1]
    assert out.index("step 0, row 3") < out.index("step 8, row 3") and "row 4" not in out
    assert len(json.loads(rlhf("rollouts", run, "--json")[1])) == 13
    found = json.loads(rlhf("rollouts", run, "--json", "--step", "0")[1])
    assert found == ROLLOUTS[0]
    code, _, err = rlhf("rollouts", run, "--step", "5")
    assert code == 2 and "no rollout was drawn after this step" in err and "use one of 0, 8" in err
    code, _, err = rlhf("rollouts", run, "--row", "99")
    assert code == 2 and "no group of this row is kept" in err


def test_a_run_without_rollouts_and_what_is_no_run_are_errors(tmp_path: Path, rlhf: Command) -> None:
    run = run_of(tmp_path / "run", [])
    code, _, err = rlhf("rollouts", run)
    assert code == 2 and "the run has kept no rollouts" in err and "logging.rollouts.groups" in err
    code, _, err = rlhf("rollouts", str(tmp_path))
    assert code == 7 and "is not a run's directory" in err and "did you mean" in err.lower()


def test_damaged_lines_are_left_out_with_a_warning(tmp_path: Path, rlhf: Command) -> None:
    run = run_of(tmp_path / "run", ROLLOUTS)
    path = tmp_path / "run" / "rollouts.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    code, out, err = rlhf("rollouts", run)
    assert code == 0 and "row 4" in out and "damaged and left out: line 1" in err
