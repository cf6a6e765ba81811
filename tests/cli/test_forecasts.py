"""`rlhf validate FILE` and `rlhf train … --dry-run`: every mistake at once, and what the run takes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import registry
from rlhf_core.testing.tiny import save_tiny
from rlhf_core.training import run_forecast
from rlhf_core.training.job import check_job
from rlhf_core.training.run_forecast import forecast

GOOD = {"prompt": "What is 2 + 2?", "response": "4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("forecast") / "model", layers=1, hidden=16, max_positions=64))


def _write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_twelve_mistakes_are_twelve_lines(rlhf, tmp_path: Path, model: str) -> None:
    rows = _write(tmp_path / "rows.jsonl", GOOD, {"prompt": "a"}, GOOD, {"prompt": "a", "response": ""})
    path = tmp_path / "run.yaml"
    path.write_text(
        f"method: sft\nmodel: {model}\ndata: {rows}\n"
        "bta: 1\nepochs: many\nbatch_size: 0\nlearning_rate: -1\nprecision: float33\nmax_length: long\n"
        "lora: {rnk: 4, alpha: 0}\nlogging: {every: 0}\ndataset: {truncation: middle}\n"
    )
    for command in (["validate", str(path)], ["train", str(path), "--dry-run"]):
        code, out, err = rlhf(*command)
        assert (code, out) == (2, "")
        lines = err.splitlines()
        assert len(lines) == 12 and all(line.startswith("error[") for line in lines), err
        assert sum(line.startswith(f"error[data] {rows}:") for line in lines) == 2
    # A run that is begun anyway is refused with every mistake of its options.
    assert rlhf("train", str(path))[2].count("error[config]") == 10


def test_the_shares_of_a_mixture_are_shown(rlhf, tmp_path: Path, model: str) -> None:
    easy, hard = _write(tmp_path / "easy.jsonl", *[GOOD] * 30), _write(tmp_path / "hard.jsonl", *[GOOD] * 10)
    path = tmp_path / "run.yaml"
    for entries, line in (
        (f"[{easy}, {{path: {hard}, weight: 3}}]", "easy 50 % (30 rows); hard 50 % (30 rows)"),
        (
            f"[{{path: {easy}, share: 0.25}}, {hard}]",
            "easy 25 % (30 rows, each 0.33 times in an epoch); hard 75 % (10 rows, each 3 times in an epoch)",
        ),
    ):
        path.write_text(f"method: sft\nmodel: {model}\ndata: {entries}\n")
        assert f"mixture: {line}" in rlhf("validate", str(path))[1].splitlines()
        assert f"# mixture: {line}" in rlhf("train", str(path), "--dry-run")[1].splitlines()
    path.write_text(
        f"method: sft\nmodel: {model}\ndata: [{{path: {easy}, share: 0.5}}, {{path: {hard}, share: 0.6}}]\n"
    )
    assert rlhf("validate", str(path))[2].count("error[") == 1


def test_what_a_run_would_refuse_is_told_before(rlhf, tmp_path: Path, model: str) -> None:
    rows = _write(tmp_path / "rows.jsonl", *[GOOD] * 40)
    given = ["--model", model, "--data", rows, "--output"]
    for output, problem in (
        (rows, "is a file, not a directory; fix:"),
        (model, "is not empty and not a run's directory, so"),
    ):
        for command in ("validate", "train"):
            code, out, err = rlhf(command, "sft", *given, output, *["--dry-run"] * (command == "train"))
            assert (code, out) == (7, "") and err.startswith(f"error[io] {output}: {problem}") and err.count("\n") == 1
    code, _, err = rlhf("validate", "sft", *given, str(tmp_path / "run"), "--warmup-steps", "9")
    assert code == 2 and "the warm-up leaves no step for the learning rate itself; got 9 of 5 steps" in err
    lines = rlhf("validate", "sft", *given, str(tmp_path / "run"), "--batch-size", "64")[1].splitlines()
    assert "steps: 1; there are fewer rows than the `batch_size` of 64" in lines


def test_a_wrong_entry_of_data_is_told_once(rlhf, tmp_path: Path, model: str) -> None:
    rows, path = _write(tmp_path / "rows.jsonl", GOOD), tmp_path / "run.yaml"
    path.write_text(
        f"method: sft\nmodel: {model}\ndata:\n  - {rows}\n  - {{path: {rows}, weight: 2, share: 0.3}}\neval_data: {rows}x\n"
    )
    lines = rlhf("validate", str(path))[2].splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"error[config] {path}:5: `data.1`: `weight` and `share` both")
    assert lines[1].startswith(f"error[data] {rows}x: no such file")


def test_mistakes_of_flags_are_all_told(rlhf, tmp_path: Path) -> None:
    flags = ["--bta", "1", "--epochs", "many", "--batch-size", "--modle", "m"]
    code, _, err = rlhf("train", "sft", "--data", str(tmp_path / "gone.jsonl"), *flags, "--dry-run")
    assert code == 2 and len(err.splitlines()) == 6, err
    for part in ("--bta", "--epochs", "--batch-size", "`--model`", "`model` is missing", "gone.jsonl: no such file"):
        assert part in err


def test_a_valid_file_says_what_the_run_takes(rlhf, tmp_path: Path, model: str) -> None:
    rows = _write(tmp_path / "rows.jsonl", *({**GOOD, "response": "4" * n} for n in range(1, 101)))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"method: sft\nmodel: {model}\ndata: {rows}\nbatch_size: 8\nepochs: 3\noutput: {tmp_path / 'run'}\n"
    )
    code, out, err = rlhf("validate", str(path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"ok: {path} is a valid configuration of rlhf-core:sft"
    assert "rows: 100, all can be used, `max_length: 64` cuts 52.0 %" in lines
    assert "steps: 38" in lines and lines[-1] == f"output: {tmp_path / 'run'} (new)"
    for name in ("parameters", "memory", "time", "disk"):
        assert any(line.startswith(f"{name}: ") for line in lines), name
    assert "# steps: 38" in rlhf("train", str(path), "--dry-run")[1].splitlines()


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}}])
def test_the_figures_are_the_runs(
    tmp_path: Path, model: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = _write(tmp_path / "rows.jsonl", *({**GOOD, "id": n} for n in range(7)))
    given = {"model": model, "data": rows, "output": str(tmp_path / "run"), "batch_size": 2, "epochs": 1.5}
    checked = check_job("sft", {**given, **options, "logging.progress": False})
    found = forecast(checked)
    assert not found.mistakes and found.parameters is not None
    assert checked.job is not None
    with caplog.at_level(logging.INFO):
        result = checked.job.trainer().train()
    assert found.steps == result.step and found.steps_exact
    trained, every = re.search(r"trainable ([\d,]+) of ([\d,]+) parameters", caplog.text).groups()  # type: ignore[union-attr]
    assert (f"{found.parameters.trained:,}", f"{found.parameters.all:,}") == (trained, every)
    assert f"the run writes at most {found.disk}; " in caplog.text


def test_a_long_file_is_read_in_part(tmp_path: Path, model: str) -> None:
    rows = _write(tmp_path / "rows.jsonl", *({"prompt": f"{n:5}", "response": "4"} for n in range(400)))
    found = forecast(check_job("sft", {"model": model, "data": rows, "batch_size": 10}), limit=40)
    assert (found.steps, found.steps_exact) == (40, False)
    assert "rows: the first 40 of about 400 were read, all can be used, `max_length: 64` cuts 0.0 %" in found.lines()
    assert "steps: about 40" in found.lines()
    assert run_forecast.ROWS_READ == 10_000


def test_held_out_rows_are_read_too(rlhf, tmp_path: Path, model: str) -> None:
    rows, held_out = _write(tmp_path / "a.jsonl", GOOD), _write(tmp_path / "b.jsonl", GOOD, {"prompt": "a"})
    code, _, err = rlhf("train", "sft", "--model", model, "--data", rows, "--eval-data", held_out, "--dry-run")
    assert code == 3 and err.startswith(f"error[data] {held_out}:2: no column `response`")


def test_options_that_do_not_go_together_are_told_with_the_rows(rlhf, tmp_path: Path, model: str) -> None:
    rows = _write(tmp_path / "a.jsonl", GOOD, {"prompt": "a"})
    code, _, err = rlhf("train", "sft", "--model", model, "--data", rows, "--eval-steps", "5", "--dry-run")
    assert code == 2 and "eval_steps: evaluations need held-out data" in err and f"{rows}:2" in err


def test_where_the_data_decide_there_is_no_number_of_steps(tmp_path: Path, model: str) -> None:
    rows = _write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    given = {"model": model, "data": rows, "rewards": [{"name": "length", "options": {"target": 5}}], "batch_size": 2}
    checked = check_job("grpo", given)
    found = forecast(checked)
    assert not found.mistakes, found.mistakes.kept
    windows = registry.get("trainer", "grpo").windows_per_batch(checked.job.trainer())  # type: ignore[union-attr]
    assert found.steps == (None if windows is None else windows)


def test_options_of_a_reward_are_not_taken_for_those_of_the_method(rlhf, tmp_path: Path, model: str) -> None:
    rows = _write(tmp_path / "rows.jsonl", {"prompt": "a"})
    code, _, err = rlhf("train", "grpo", "--model", model, "--data", rows, "--output", "o", "--rewards", "length")
    assert code == 2 and "set `target`, `max_length`, or both" in err
