"""A configuration file that is given to another command than its own is answered with that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FILES = {
    "run": "model: m\nstages: [{method: sft, data: d.jsonl}]\n",
    "train": "method: sft\nmodel: m\ndata: d.jsonl\n",
    "merge": "merge_method: linear\nmodels: [{model: a}, {model: b}]\n",
    "sample": "method: best_of_n\nmodel: m\nprompts: p.jsonl\n",
    "evaluate": "model: m\nprompts: p.jsonl\nvalidator: numeric_answer\n",
    "test-capabilities": "suites: [{name: s, prompts: p.jsonl, validator: numeric_answer}]\n",
}
"""Command → a file of its."""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(command: str) -> str:
        Path("f.yaml").write_text(FILES[command])
        return "f.yaml"

    return write


@pytest.mark.parametrize("given", FILES)
@pytest.mark.parametrize("own", FILES)
def test_every_file_finds_its_command(rlhf: Any, file: Any, own: str, given: str) -> None:
    more = ["--model", "m"] if given == "test-capabilities" else []
    code, out, err = rlhf(given, file(own), *more)
    assert code != 0 and out == "" and err.startswith("error[")
    if own == given or (own, given) == ("evaluate", "sample"):  # which may only lack its `method`
        assert "configures" not in err
    else:
        assert code == 2 and err.count("\n") == 1 and f"fix: `rlhf {own} f.yaml`" in err


def test_a_check_is_answered_with_a_check(rlhf: Any, file: Any) -> None:
    assert rlhf("run", file("train"), "--dry-run")[2] == (
        "error[config] f.yaml: configures a training run, not a pipeline; fix: `rlhf train f.yaml --dry-run`\n"
    )
    assert "fix: `rlhf evaluate f.yaml --dry-run`" in rlhf("validate", file("evaluate"))[2]
    assert "fix: `rlhf test-capabilities f.yaml`\n" in rlhf("validate", file("test-capabilities"))[2]


def test_a_file_without_method_or_stages_may_be_a_recipe(rlhf: Any, file: Any) -> None:
    Path("f.yaml").write_text("model: m\noutput: o\n")
    assert "; a recipe of several, for `rlhf run`, has `stages`\n" in rlhf("validate", "f.yaml")[2]
    Path("f.yaml").write_text("model: m\noutput: o\nstage:\n- {method: sft, data: d}\n")
    assert "has `stages` (did you mean it by `stage`?)\n" in rlhf("validate", "f.yaml")[2]


def test_what_may_be_anything_is_read_as_the_commands_own(rlhf: Any, file: Any) -> None:
    for text in ("method: tis\n", "model: m\n", "[broken", "method: 3\n"):
        Path("f.yaml").write_text(text)
        for command in ("run", "train", "merge", "sample", "evaluate"):
            code, _, err = rlhf(command, "f.yaml")
            assert code == 2 and "configures" not in err
    assert "configures" not in rlhf("train", "no-such-file.yaml")[2]
