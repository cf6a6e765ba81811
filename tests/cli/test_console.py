"""What a person sees in a terminal: methods and their options, a run, and how it fails, at 80 and 120 columns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core import registry
from rlhf_core.cli import exit_code, main
from rlhf_core.infra.errors import DataError
from rlhf_core.testing.tiny import save_tiny

TRAINERS = [plugin.name for plugin in registry.find("trainer") if plugin.distribution == "rlhf-core"]


def widen(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Let stdout be a terminal of so many columns, without colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "arguments", [["show", "NAME"], ["show", "NAME", "--all"], ["train", "NAME", "--help"]], ids=" ".join
)
def test_options_are_wrapped_with_whole_names_and_types_in_words(
    columns: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    widen(monkeypatch, columns)
    for name in TRAINERS:
        assert main([f"trainer:{name}" if word == "NAME" else word for word in arguments]) == 0
        out = capsys.readouterr().out
        long = [line for line in out.splitlines() if len(line) > columns]
        assert [line for line in long if len(line.split()) > 2] == []  # a path is never broken
        assert not re.search(
            r"Literal\[|\| None|Optional\[|by default (None|True|False|')|Field\(|LossType|VariantName", out
        )
        assert re.search(r"^(--)?\w+  number, by default [0-9]", out, re.MULTILINE), name
    if arguments[0] == "show":
        names = {line.split()[0] for line in out.splitlines() if line[:1].strip()}
        assert {option["name"] for option in options(name, arguments, capsys)} <= names


def options(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    assert main(["show", f"trainer:{name}", "--json", *arguments[2:]]) == 0
    return json.loads(capsys.readouterr().out)["options"]


def test_choices_are_read_through_imports(capsys: pytest.CaptureFixture[str]) -> None:
    found = {option["name"]: option for option in options("grpo", [], capsys)}
    assert found["variant"]["type"].startswith("`grpo`, `dr_grpo`") and found["variant"]["default"] == "grpo"
    assert found["equal_groups"]["type"] == "`keep`, `skip`, `resample` or null"
    assert (found["clip"]["type"], found["clip"]["default"]) == ("text or null", "null")


def test_the_help_of_a_method_has_its_options_first_and_all_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    widen(monkeypatch, 80)
    assert main(["train", "dpo", "--help"]) == 0
    out = capsys.readouterr().out
    places = [
        out.index(text)
        for text in ("--model", "--beta  number, by default 0.1", "--batch_size", "--lora\n", "--resume")
    ]
    assert places == sorted(places) and "rank, alpha" in out
    assert main(["train", "dpoo", "-h"]) == 2 and "did you mean `dpo`?" in capsys.readouterr().err


def test_torchrun_gets_the_line_of_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise DataError("no such file", place="rows.jsonl")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert exit_code(fails) == 3
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == message["message"] == "error[data] rows.jsonl: no such file"
    assert capsys.readouterr().err == "error[data] rows.jsonl: no such file\n"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    save_tiny(folder / "model")
    rows = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def train(task: Path, *more: str, processes: int = 1, data: str = "pairs.jsonl") -> subprocess.CompletedProcess[str]:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [
        sys.executable,
        "-P",
        *launch,
        "-m",
        "rlhf_core",
        "train",
        "dpo",
        "--model",
        "model",
        "--data",
        data,
        *more,
    ]
    options = ["--output", "run", "--overwrite", "--max_steps", "2", "--batch_size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *options], cwd=task, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--eval_data", "pairs.jsonl", "--eval_steps", "1"],
        ["--lora.rank", "2", "--precision", "bf16", "--gradient_checkpointing", "true", "--dataset.streaming", "true"],
    ],
    ids=["plain", "adapter"],
)
def test_a_run_writes_nothing_but_its_own_lines(task: Path, more: list[str]) -> None:
    done = train(task, *more)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d |  eval_\S+  ", line)] == []
    steps = [line for line in lines if " step " in line and "loss" in line]
    assert len(steps) == 2 and max(map(len, steps)) <= 80
    assert done.stdout.startswith("done: 2 steps") and "eval_" not in done.stdout
    assert done.stderr.count("evaluation of step 2") == ("--eval_data" in more)


@pytest.mark.slow
def test_the_report_of_torchrun_ends_with_our_line(task: Path) -> None:
    done = train(task, processes=2, data="nothing.jsonl")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-2].strip().startswith("traceback : error[data] nothing.jsonl: no such file")
