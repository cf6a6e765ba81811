"""`rlhf evaluate --tasks`: what is asked for is checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.cli import main
from rlhf_core.cli.evaluate_tasks import load_task_run, names_tasks

ASKED = ["evaluate", "--model", "nowhere", "--tasks", "gsm8k,mine"]


def test_flags_and_a_file_say_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("model: m\ntasks: [a, 'b, c']\nlimit: 3\n")
    assert (
        names_tasks(str(file), []) and names_tasks(None, ["--tasks", "a"]) and not names_tasks(None, ["--limit", "1"])
    )
    run = load_task_run(str(file), ["--limit", "4", "--generation.max_gen_toks", "9", "--apply-chat-template"])
    assert run.tasks == ["a", "b", "c"] and run.limit == 4 and run.model.path == "m"
    assert run.generation == {"max_gen_toks": 9} and run.apply_chat_template is True
    assert main([*ASKED, "--dry-run", "--num-fewshot", "5"]) == 0
    shown = capsys.readouterr().out
    assert "num_fewshot: 5" in shown and "- mine" in shown


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--compare", "x"], "--compare"),
        (["--resume"], "--resume"),
        (["--num-fewshto", "5"], "num_fewshot"),
        (["--prompts", "a.jsonl"], "prompts"),
        (["--limit", "0"], "limit"),
        (["--precision", "int3"], "precision"),
    ],
)
def test_wrong_options_are_refused(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, *flags]) == 2
    assert problem in capsys.readouterr().err


def test_a_report_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="the extra `lm-eval` isn't installed")
    (tmp_path / "lm_eval.json").write_text("{}")
    assert main([*ASKED, "--output", str(tmp_path)]) == 7
    assert "--overwrite" in capsys.readouterr().err
    assert main([*ASKED, "--output", str(tmp_path), "--overwrite"]) == 4  # the model isn't there
    assert main(["evaluate", "--tasks", "a"]) == 2
    assert "`model` is missing" in capsys.readouterr().err
