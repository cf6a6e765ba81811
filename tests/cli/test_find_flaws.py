"""`rlhf find-flaws`: rows of every shape get their flaws, and a report says how many have which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main

LOOP = "again and again and again and again and again and again and again."
ROWS = [
    {"prompt": "6*7=?", "completion": "6*7=42\n#### 42", "answer": "42"},
    {"prompt": "6*7=?", "completions": ["#### 41", LOOP], "answer": "42"},
    {"prompt": "Hi!", "chosen": "Hello.", "rejected": "I'm sorry, but I can't help with that."},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_rows_get_their_flaws(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = tmp_path / "flaws.jsonl", tmp_path / "report.json"
    words = ["find-flaws", "--data", str(data), "--output", str(output), "--report", str(report)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "repetition" in shown and "refusal" in shown and "completions: 5" in shown
    one, several, pair = (json.loads(line) for line in output.read_text().splitlines())
    assert one["flaws"] == [] and one["quality"] == 1.0 and one["answer"] == "42"
    assert several["flaws"][0] == ["contradiction"] and "repetition" in several["flaws"][1]
    assert pair["chosen_flaws"] == [] and pair["rejected_flaws"] == ["refusal"]
    places = [each["place"] for each in json.loads(report.read_text())["completions"]]
    assert places == [f"{data}:{line}" for line in (1, 2, 2, 3, 3)]
    assert main(words) == 7 and "`--overwrite` replaces it" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--detectors", "refusal"]) == 0
    assert json.loads(output.read_text().splitlines()[1])["flaws"] == [[], []]
    assert main(["find-flaws", "--data", str(output)]) == 0  # nothing is written, so columns may have these names
    assert main(["find-flaws", "--data", str(output), "--output", str(tmp_path / "b.jsonl")]) == 3


def test_a_reward_that_is_pleased_by_what_is_wrong(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["find-flaws", "--data", str(data), "--limit", "2", "--json", "--proxy.name", "length"]
    words += ["--proxy.options.target", "40", "--verifier", "numeric_answer"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert "reward_hacking" in found["shares"] and found["gap"]["auc"] is not None and "completions" not in found


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--proxy", "length"], "give both `proxy` and `verifier`"),
        (["--detectors", "repetitoin"], "did you mean `repetition`?"),
        (["--outptu", "x"], "did you mean `--output`?"),
        (["--verifier", "nomeric_answer", "--proxy", "repetition"], "did you mean `numeric_answer`?"),
    ],
)
def test_wrong_options_are_named(data: Path, flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find-flaws", "--data", str(data), *flags]) == 2
    assert text in capsys.readouterr().err
    assert main(["find-flaws"]) == 2 and "no rows are named" in capsys.readouterr().err
