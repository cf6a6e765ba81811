"""`rlhf score`: files of completions in every shape get scores, in order, and nothing that was scored is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli import main
from rlhf_core.data.row_output import RowOutput
from rlhf_core.evaluation.score_file import SCORES
from rlhf_core.models import ProcessRewardModel, RewardModel, ValueModel
from rlhf_core.testing.tiny import save_tiny

HERE = Path(__file__).parent
ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "completion": "2", "answer": "2", "id": 7},
    {"prompt": [{"role": "user", "content": "1+2="}], "completion": "", "answer": "3", "stop_reason": "end"},
    {"prompt": "2+2=", "completions": ["4", "5"], "answer": "4", "stop_reasons": ["end", "length"], "tokens": [2, 2]},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": "1+1="},
            {"role": "assistant", "content": "2"},
        ],
        "answer": "2",
    },
    {"prompt": "2+3=", "chosen": "5", "rejected": "6", "answer": "5"},
    {"prompt": "2+3=", "response": "5", "answer": "5"},
]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)


def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def read(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_rows_of_every_shape_keep_their_columns_and_get_scores(rlhf) -> None:
    code, out, _ = rlhf(
        "score", "score_rewards:exact", "--data", write(ROWS), "--output", "out.jsonl", "--bonus", "2", "--json"
    )
    assert code == 0
    added: list[dict[str, Any]] = [
        {"score": 2.0},
        {"score": 0.0},
        {"scores": [2.0, 0.0]},
        {"score": 2.0},
        {"chosen_score": 2.0, "rejected_score": 0.0},
        {"score": 2.0},
    ]
    assert read() == [row | more for row, more in zip(ROWS, added, strict=True)]
    found = json.loads(out)
    assert {key: found[key] for key in ("rows", "completions", "mean", "min", "max", "pairs", "accuracy")} == {
        "rows": 6, "completions": 8, "mean": 1.25, "min": 0.0, "max": 2.0, "pairs": 1, "accuracy": 1.0,
    }  # fmt: skip
    assert found["std"] == pytest.approx((8 * 15 / 64 * 4 / 7) ** 0.5, abs=1e-6)  # 5 of 8 at 2
    assert found["quantiles"]["0.5"] == 2.0 and found["output"] == "out.jsonl"


def test_an_async_function_scores_and_a_summary_is_printed(rlhf) -> None:
    code, out, _ = rlhf("score", f"{HERE}/score_rewards.py:brevity", "--data", write(ROWS))
    assert code == 0 and "brevity: 8 completions in 6 rows" in out and "mean -0.875" in out
    assert not Path("out.jsonl").exists()


def test_the_summary_is_broken_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["score", "repetition", "--data", write(ROWS[4:5])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and "the 1 of equal scores as half right" in " ".join(lines)


def test_columns_may_have_other_names(rlhf) -> None:
    data = write([{"question": "1+1=", "said": "2", "answer": "2"}])
    code, _, _ = rlhf(
        "score", "score_rewards:exact", "--data", data, "--output", "out.jsonl", "--score-column", "right",
        "--columns.prompt", "question", "--columns.completion", "said",
    )  # fmt: skip
    assert code == 0 and read() == [{"question": "1+1=", "said": "2", "answer": "2", "right": 1.0}]


def test_what_was_scored_survives_ctrl_c_and_is_continued(rlhf) -> None:
    data = write([{"prompt": "p", "completion": str(number)} for number in range(40)])
    given = ("--data", data, "--output", "out.jsonl", "--batch-size", "8")
    code, _, err = rlhf("score", "score_rewards:interrupts", *given)
    assert code == 75 and "stopped by Ctrl-C after 16 rows" in err and "--resume" in err
    assert [row["completion"] for row in read()] == [str(number) for number in range(16)]
    code, _, err = rlhf("score", "score_rewards:continues", *given, "--resume")
    assert code == 2 and "the reward changed since the file was begun" in err
    record = Path("out.score.json")  # as if the same reward went on
    record.write_text(record.read_text().replace("interrupts", "continues"), encoding="utf-8")
    with Path("out.jsonl").open("a") as file:
        file.write('{"prompt": "p", "comple')  # what a kill leaves
    code, out, _ = rlhf("score", "score_rewards:continues", *given, "--resume", "--json")
    assert code == 0 and json.loads(out)["mean"] == (16 + 2 * 24) / 40
    assert [(row["completion"], row["score"]) for row in read()] == [
        (str(number), 1.0 if number < 16 else 2.0) for number in range(40)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_rows_that_were_scored(number: signal.Signals) -> None:
    data = write([{"prompt": "p", "completion": str(at)} for at in range(30)])
    Path("slow.py").write_text(
        "import time\n\ndef slow(prompts, completions):\n    time.sleep(0.2)\n    return [float(c) for c in completions]\n"
    )
    command = [sys.executable, "-m", "rlhf_core", "score", "slow.py:slow", "--data", data, "--output", "out.jsonl"]
    command += ["--batch-size", "1", "--runs-in", "thread"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (Path("out.jsonl").exists() and Path("out.jsonl").stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate()
    by = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert process.returncode == 75 and f"stopped by {by} after {len(read())} rows" in err and "--resume" in err
    assert 1 <= len(read()) < 30 and json.loads(Path("out.score.json").read_text())["status"] == "stopped"
    subprocess.run([*command, "--resume"], check=True)
    assert [row["score"] for row in read()] == list(range(30))


@pytest.mark.parametrize(
    ("rows", "flags", "code", "said"),
    [
        ([{"prompt": "p", "completion": "a"}, {"prompt": "p", "answer2": 3}], (), 3, "rows.jsonl:2: no column `response`"),
        ([{"completion": "a"}], (), 3, "rows.jsonl:1: no column `prompt`"),
        ([{"prompt": "p", "completion": 3}], (), 3, "rows.jsonl:1: `completion` must be text"),
        ([{"prompt": "p", "completions": []}], (), 3, "rows.jsonl:1: `completions` is an empty list"),
        ([{"prompt": "p", "completion": "a", "score": 1}], ("--output", "o"), 3, "rows.jsonl:1: the row has a column `score`"),
        ([{"prompt": "p", "completion": "a"}], ("--bonuss", "2"), 2, "did you mean `bonus`"),
        ([{"prompt": "p", "completion": "a"}], ("--resume",), 2, "no file is named"),
        ([{"prompt": "p", "completion": "a"}], ("--columns.completon", "x"), 3, "did you mean `completion`"),
        ([{"prompt": "p", "completion": "a"}], (), 5, "needs a column `answer`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(rlhf, rows: Any, flags: tuple[str, ...], code: int, said: str) -> None:
    found, _, err = rlhf("score", "score_rewards:exact", "--data", write(rows), *flags)
    assert (found, err.count("\n")) == (code, 1) and said in err


def test_an_unknown_reward_and_a_module_that_is_not_there_are_named(rlhf) -> None:
    for name, said in (
        ("score_rewards:exat", "did you mean `exact`"),
        ("no_such_module:exact", "there is no module `no_such_module`"),
        ("reward_modle", "did you mean `reward_model`"),
    ):
        code, _, err = rlhf("score", name, "--data", write(ROWS))
        assert code == 2 and said in err
    code, _, err = rlhf("score", "reward_model", "--data", "rows.jsonl")
    assert code == 2 and "`model` is missing" in err


@pytest.mark.parametrize("kind", ["reward", "process_reward", "value"])
def test_the_directory_of_a_reward_model_or_of_its_run_scores(rlhf, kind: str, tmp_path: Path) -> None:
    cls: Any = {"reward": RewardModel, "process_reward": ProcessRewardModel, "value": ValueModel}[kind]
    cls.from_pretrained(save_tiny(tmp_path / "tiny"), new_head=True, seed=1).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "reward_model").mkdir()  # a directory of this name doesn't hide the reward
    for model in ("run/model", "run"):
        code, out, _ = rlhf("score", model, "--data", write(ROWS[4:]), "--json")
        assert code == 0 and json.loads(out)["completions"] == 3
    assert rlhf("score", "reward_model", "--data", "rows.jsonl", "--model", "run/model")[0] == (
        0 if kind == "reward" else 4
    )


def test_an_output_that_the_data_would_match_later_is_refused_and_none_is_left_behind(rlhf) -> None:
    Path("in").mkdir()
    write(ROWS, "in/rows.jsonl")
    code, _, err = rlhf("score", "score_rewards:exact", "--data", "in/*.jsonl", "--output", "in/out.jsonl")
    assert code == 2 and "in/out.jsonl: is read and written" in err
    code, _, err = rlhf("score", "score_rewards:nothing_of_the_kind", "--data", "in/*.jsonl", "--output", "out.jsonl")
    assert code and not Path("out.jsonl").exists() and not Path("in/out.jsonl").exists()
    code, _, _ = rlhf("score", "score_rewards:exact", "--data", "in/*.jsonl", "--output", "out.jsonl")
    assert code == 0 and len(read()) == len(ROWS)


def test_an_output_file_that_exists_is_kept(rlhf) -> None:
    Path("out.jsonl").write_text("mine\n", encoding="utf-8")
    given = ("score", "score_rewards:exact", "--data", write(ROWS), "--output", "out.jsonl")
    code, _, err = rlhf(*given)
    assert code == 7 and "`--overwrite` replaces it" in err and Path("out.jsonl").read_text() == "mine\n"
    assert rlhf(*given, "--overwrite")[0] == 0 and len(read()) == 6


@pytest.mark.parametrize(
    ("flags", "code"),
    [("--runs-in main", 5), ("--runs-in thread", 5), ("--runs-in process", 5), ("--runs-in thread --debug", 1)],
)
def test_a_hanging_reward_ends_the_process_with_its_exit_code(flags: str, code: int) -> None:
    data = write([{"prompt": "p", "completion": text} for text in ("good", "bad", "good")])
    program = "from rlhf_core.cli import main; import sys; sys.exit(main())"
    arguments = f"score {HERE}/score_rewards.py:hangs --data {data} --time-limit 1 {flags}".split()
    began = time.monotonic()
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (
        done.returncode == code
        and "reward `hangs`, row rows.jsonl:2: scoring took longer than 1 seconds" in done.stderr
    )
    assert ("Traceback" in done.stderr) == ("--debug" in flags)
    assert time.monotonic() - began < 60


def test_an_old_file_is_replaced_only_once_there_is_a_new_row(rlhf) -> None:
    given = ("score", "score_rewards:exact", "--output", "out.jsonl", "--data")
    assert rlhf(*given, write(ROWS[:2]))[0] == 0
    before = Path("out.jsonl").read_bytes(), Path("out.score.json").read_bytes()
    assert b'"done"' in before[1]
    bad = write([{"nothing": 1}], "bad.jsonl")
    unanswered = write([{"prompt": "p", "completion": "a"}], "unanswered.jsonl")
    for data, code in ((bad, 3), (unanswered, 5), ("out.jsonl", 2)):
        assert rlhf(*given, data, "--overwrite")[0] == code
        assert (Path("out.jsonl").read_bytes(), Path("out.score.json").read_bytes()) == before
    assert rlhf(*given, "rows.jsonl", "--resume")[0] == 0 and len(read()) == 2
    assert rlhf(*given, write(ROWS[4:], "two.jsonl"), "--overwrite")[0] == 0
    assert [row["prompt"] for row in read()] == ["2+3=", "2+3="]


def test_an_empty_line_keeps_rows_apart_when_a_file_is_continued(rlhf) -> None:
    given = ("score", "score_rewards:exact", "--output", "out.jsonl", "--data", write(ROWS))
    assert rlhf(*given)[0] == 0
    lines = Path("out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("out.jsonl").write_text("".join([*lines[:2], "\n", *lines[2:4]]), encoding="utf-8")
    code, out, _ = rlhf(*given, "--resume", "--json")
    assert code == 0 and json.loads(out)["rows"] == 6
    found = Path("out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert found == [*lines[:2], "\n", *lines[2:]]


def test_rows_of_others_are_not_continued(rlhf) -> None:
    given = ("score", "score_rewards:exact", "--output", "out.jsonl", "--data", write(ROWS))
    assert rlhf(*given)[0] == 0
    whole = Path("out.jsonl").read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    for changed in ("[1]\n", "{\n", lines[0], json.dumps(ROWS[1]) + "\n"):
        Path("out.jsonl").write_text("".join([lines[0], changed]), encoding="utf-8")
        code, _, err = rlhf(*given, "--resume")
        assert code == 7 and "out.jsonl:2: isn't the row of rows.jsonl:2 with a score" in err
        assert Path("out.jsonl").read_text(encoding="utf-8") == "".join([lines[0], changed])
    Path("out.jsonl").write_text(whole, encoding="utf-8")
    Path("out.score.json").unlink()
    code, _, err = rlhf(*given, "--resume")
    assert code == 7 and "there is no record of what its rows were scored by" in err


def test_one_process_at_a_time_writes_a_file(rlhf) -> None:
    given = ("score", "score_rewards:exact", "--output", "out.jsonl", "--data", write(ROWS))
    assert rlhf(*given)[0] == 0
    before = Path("out.jsonl").read_bytes()
    with RowOutput(Path("out.jsonl"), SCORES, {}, resume=False, overwrite=True):
        for flag in ("--resume", "--overwrite"):
            code, _, err = rlhf(*given, flag)
            assert code == 7 and "another process is writing this file" in err
    assert rlhf(*given, "--resume")[0] == 0 and Path("out.jsonl").read_bytes() == before


def test_what_a_careless_user_types_says_what_to_type(rlhf) -> None:
    code, _, err = rlhf("score", "exact_match")
    assert code == 2 and "give `--data FILE`" in err
    prompts = write([{"prompt": "1+1=", "answer": "2"}])  # its answer would be right, whatever the model
    code, _, err = rlhf("score", "exact_match", "--data", prompts)
    assert code == 3 and "rows.jsonl:1: has no completion: `answer` is read as the reference" in err
    code, out, _ = rlhf("score", "repetition", "--data", prompts, "--columns.response", "answer")
    assert code == 0 and "1 completions in 1 rows" in out
    unanswered = write(
        [{"prompt": "p", "completion": "a", "answer": "a"}, {"prompt": "p", "completion": "a"}], "c.jsonl"
    )
    code, _, err = rlhf("score", "exact_match", "--data", unanswered)
    assert code == 3 and "reward `exact_match`, row c.jsonl:2: the row has no column `answer`" in err
    Path("csv.jsonl").write_text("prompt,completion,answer\np,4,4\n")
    code, _, err = rlhf("score", "exact_match", "--data", "csv.jsonl")
    assert code == 3 and "csv.jsonl:1:1: not valid JSON" in err and "name the file .csv" in err
