"""`rlhf sample`: rows in order with their columns, the same after any stop, and a clear error before anything is drawn."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contracts.best_of_n import BestOfNSampler
from rlhf_plugins.samplers.generate import GenerateSampler

from rlhf_core import registry
from rlhf_core.testing.tiny import save_tiny

Rlhf = Callable[..., tuple[int, str, str]]

ROWS: list[dict[str, Any]] = [
    {"id": 1, "prompt": "1+1=?", "answer": "2"},
    {"id": 2, "prompt": [{"role": "user", "content": "Ü 😀?"}], "meta": {"of": ["x", None, 0.5]}},
    {"id": 3, "prompt": "1+1=?"},
    {"id": 4, "prompt": "4"},
    {"id": 5, "prompt": "1+1=?"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("sample") / "model", layers=1, max_positions=64))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def best() -> Iterator[None]:
    registry.register("sampler", "kit-best", BestOfNSampler)
    yield
    registry.unregister("sampler", "kit-best")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arguments(model: str, prompts: str, output: Path | str, *more: str) -> list[str]:
    own = ["--model", model, "--prompts", prompts, "--output", str(output), "--max-new-tokens", "6"]
    return ["sample", "generate", *own, *more]


def test_rows_are_in_order_with_all_of_their_columns(rlhf: Rlhf, model: str, prompts: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    code, out, _ = rlhf(*arguments(model, prompts, output))
    rows = read(output)
    assert code == 0 and "sampled: 5 rows" in out and str(output) in out
    assert [{name: row[name] for name in given} for row, given in zip(rows, ROWS, strict=True)] == ROWS
    for row, given in zip(rows, ROWS, strict=True):
        assert list(row) == [*given, "completion", "stop_reason", "tokens"]
        assert isinstance(row["completion"], str) and row["stop_reason"] in ("end", "length") and row["tokens"] <= 6
    # A prompt that comes again gets other completions.
    assert len({rows[number]["completion"] for number in (0, 2, 4)}) > 1


def test_several_completions_are_lists_with_ids_and_logprobs_on_demand(
    rlhf: Rlhf, model: str, prompts: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert rlhf(*arguments(model, prompts, output, "--n", "3", "--ids", "--logprobs", "--limit", "2"))[0] == 0
    rows = read(output)
    assert len(rows) == 2
    for row in rows:
        assert len(row["completions"]) == len(row["stop_reasons"]) == len(row["tokens"]) == 3
        for name in ("completion_ids", "logprobs", "raw_logprobs"):
            assert [len(one) for one in row[name]] == row["tokens"]


def test_a_samplers_roles_and_scores(rlhf: Rlhf, best: None, model: str, tmp_path: Path) -> None:
    (tmp_path / "brief.py").write_text(
        "def brief(prompts, completions, **columns): return [-len(one) for one in completions]"
    )
    output = tmp_path / "out.jsonl"
    own = ["--model", model, "--reward", f"{tmp_path}/brief.py:brief", "--prompts", "1+1=?", "--draws", "3"]
    code, _, err = rlhf("sample", "kit-best", *own, "--generation.max_new_tokens=5", "--n=2", "--output", str(output))
    assert code == 0, err
    (row,) = read(output)
    assert row["prompt"] == "1+1=?" and row["scores"] == sorted(row["scores"], reverse=True)
    assert row["scores"] == [-len(text) for text in row["completions"]]
    code, _, err = rlhf("sample", "kit-best", "--model", model, "--prompts", "1+1=?")
    assert code == 2 and "`reward` is missing, the sampler's role `reward`" in err and "--reward NAME" in err
    code, _, err = rlhf("sample", "kit-best", "--model", model, "--prompts", "1+1=?", "--reward", "kit-bets")
    assert code == 2 and "unknown reward `kit-bets`" in err


def test_a_stopped_run_continues_to_the_same_rows(rlhf: Rlhf, model: str, prompts: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    own = arguments(model, prompts, output, "--batch-size", "2")
    assert rlhf(*own)[0] == 0
    expected = output.read_bytes()
    lines = expected.splitlines(keepends=True)
    for written in (0, 1, 2, 4, 5):
        # A kill leaves whole rows, and perhaps a part of the next.
        output.write_bytes(b"".join(lines[:written]) + b"".join(lines[written : written + 1])[:7])
        code, out, _ = rlhf(*own, "--resume")
        assert code == 0 and output.read_bytes() == expected
        assert ("were written already" in out) == (written == len(ROWS))


def test_completions_do_not_depend_on_how_many_prompts_are_sampled_at_once(
    rlhf: Rlhf, model: str, prompts: str, tmp_path: Path
) -> None:
    found = []
    for size in ("1", "2", "5"):
        output = tmp_path / f"{size}.jsonl"
        assert rlhf(*arguments(model, prompts, output, "--batch-size", size))[0] == 0
        found.append(output.read_bytes())
    assert found[0] == found[1] == found[2]


def test_ctrl_c_keeps_the_rows_that_were_written(
    rlhf: Rlhf, model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert rlhf(*arguments(model, prompts, whole, "--batch-size", "2"))[0] == 0
    calls, own = itertools.count(), GenerateSampler.sample

    def pressed(self: GenerateSampler, *given: Any, **options: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return own(self, *given, **options)

    def stopped() -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(GenerateSampler, "sample", pressed)
            code, _, err = rlhf(*arguments(model, prompts, output, "--batch-size", "2"))
        return code, err

    at = 0
    code, err = stopped()
    assert code == 75 and "stopped by Ctrl-C before anything was written" in err and not output.exists()
    calls, at = itertools.count(), 2  # of the second batch
    code, err = stopped()
    assert code == 75 and "stopped by Ctrl-C after 2 of 5 rows" in err and "--resume" in err
    assert output.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:2])
    assert json.loads((tmp_path / "out.run.json").read_text())["status"] == "stopped"
    assert rlhf(*arguments(model, prompts, output, "--batch-size", "2", "--resume"))[0] == 0
    assert output.read_bytes() == whole.read_bytes()
    assert json.loads((tmp_path / "out.run.json").read_text())["status"] == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_without_a_file_is_one_line(
    rlhf: Rlhf, model: str, prompts: str, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(GenerateSampler, "sample", stopped)
    code, _, err = rlhf("sample", "generate", "--model", model, "--prompts", prompts)
    by = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert code == 130 and f"error[interrupted] stopped by {by}" in err.splitlines()[-1]


@pytest.mark.parametrize("source", ["rows.jsonl", "./rows.jsonl", "*.jsonl", ".", "../here"])
def test_the_prompts_are_never_overwritten(
    rlhf: Rlhf, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("rows.jsonl").write_text('{"prompt": "1+1="}\n')
    before = Path("rows.jsonl").read_bytes()
    for flags in ((), ("--overwrite",), ("--resume",)):
        code, _, err = rlhf(*arguments(model, source, Path("rows.jsonl"), *flags))
        assert code == 2 and "rows.jsonl: is " in err and "read" in err and "name another file" in err
    assert Path("rows.jsonl").read_bytes() == before and [*here.iterdir()] == [here / "rows.jsonl"]


@pytest.mark.slow
def test_sigterm_and_sigkill_at_any_moment_lose_and_repeat_no_row(rlhf: Rlhf, model: str, tmp_path: Path) -> None:
    prompts = tmp_path / "many.txt"
    prompts.write_text("".join(f"{number}+{number}=?\n" for number in range(40)))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert rlhf(*arguments(model, str(prompts), whole, "--batch-size", "1"))[0] == 0
    command = [
        sys.executable,
        "-m",
        "rlhf_core",
        *arguments(model, str(prompts), output, "--batch-size", "1", "--resume"),
    ]
    for kind, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9), (signal.SIGINT, 75)):
        before = output.stat().st_size if output.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (output.exists() and output.stat().st_size > before):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(kind)
        assert process.wait() == code, process.stderr
        assert whole.read_bytes().startswith(output.read_bytes()[: output.read_bytes().rfind(b"\n") + 1])
    subprocess.run(command, check=True)
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "0.5"], "temperature: 1.0 → 0.5"),
        (["--n", "2"], "n: 1 → 2"),
        (["--seed", "1"], "seed: 0 → 1"),
        (["--limit", "3"], "prompts.rows: 5 → 3"),
    ],
)
def test_other_options_are_no_continuation(
    rlhf: Rlhf, model: str, prompts: str, tmp_path: Path, more: list[str], message: str
) -> None:
    output = tmp_path / "out.jsonl"
    assert rlhf(*arguments(model, prompts, output))[0] == 0
    before = output.read_bytes()
    code, _, err = rlhf(*arguments(model, prompts, output, "--resume", *more))
    assert code == 2 and message in err and "changed since the file was begun" in err
    assert output.read_bytes() == before


def test_other_models_prompts_or_rows_are_no_continuation(rlhf: Rlhf, model: str, prompts: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert rlhf(*arguments(model, prompts, output))[0] == 0
    other = save_tiny(tmp_path / "other", seed=1, layers=1, max_positions=64)
    code, _, err = rlhf(*arguments(str(other), prompts, output, "--resume"))
    assert code == 2 and "model.path" in err
    rows = output.read_text().splitlines(keepends=True)
    output.write_text("".join([rows[1], rows[0]]))
    code, _, err = rlhf(*arguments(model, prompts, output, "--resume"))
    assert code == 7 and f"{output}:1" in err and "isn't the row that these prompts have there" in err
    Path(prompts).write_text(json.dumps({"prompt": "9"}) + "\n")
    code, _, err = rlhf(*arguments(model, prompts, output, "--resume"))
    assert code == 2 and "prompts." in err
    assert rlhf(*arguments(model, prompts, output, "--overwrite"))[0] == 0
    assert [row["prompt"] for row in read(output)] == ["9"]


def test_a_file_that_exists_is_neither_replaced_nor_continued_unasked(
    rlhf: Rlhf, model: str, prompts: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    code, _, err = rlhf(*arguments(model, prompts, output))
    assert code == 7 and "the file exists" in err and "--overwrite" in err
    code, _, err = rlhf(*arguments(model, prompts, output, "--resume"))
    assert code == 7 and "no record of what its rows were sampled from" in err
    code, _, err = rlhf(*arguments(model, prompts, output, "--resume", "--overwrite"))
    assert code == 2 and "either continued or replaced" in err
    assert output.read_text() == "precious\n"
    code, _, err = rlhf(*arguments(model, prompts, tmp_path))
    assert code == 2 and "must end in .jsonl" in err


def test_an_old_file_is_replaced_only_once_there_is_a_new_row(
    rlhf: Rlhf, model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, record = tmp_path / "out.jsonl", tmp_path / "out.run.json"
    assert rlhf(*arguments(model, prompts, output))[0] == 0
    before = output.read_bytes(), record.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(GenerateSampler, "sample", lambda *a, **k: [])
        assert rlhf(*arguments(model, prompts, output, "--overwrite", "--seed", "1"))[0] == 5
    assert (output.read_bytes(), record.read_bytes()) == before
    assert rlhf(*arguments(model, prompts, output, "--resume"))[0] == 0 and output.read_bytes() == before[0]
    assert rlhf(*arguments(model, prompts, output, "--overwrite", "--seed", "1"))[0] == 0
    assert len(read(output)) == 5 and output.read_bytes() != before[0]


FAULTS: dict[str, tuple[list[str], int, str]] = {
    "unknown sampler": (["generat"], 2, "did you mean `generate`"),
    "a flag first": (["--model"], 2, "the first argument must be a sampler or a file"),
    "no model": (["generate", "--prompts", "hi there"], 2, "`model` is missing"),
    "no prompts": (["generate", "--model", "M"], 2, "`prompts` is missing"),
    "n below 1": (["generate", "--model", "M", "--prompts", "hi there", "--n", "0"], 2, "--n: must be greater than"),
    "temperature": (["generate", "--model", "M", "--prompts", "a b", "--temperature", "-1"], 2, "--temperature: must be"),
    "top-p": (["generate", "--model", "M", "--prompts", "a b", "--top-p", "1.5"], 2, "--top-p: must be less than"),
    "unknown option": (["generate", "--model", "M", "--prompts", "a b", "--temprature", "1"], 2, "did you mean `--temperature`"),
    "slip in a key": (["generate", "--modle", "M", "--prompts", "a b"], 2, "did you mean `--model`"),
    "no such file": (["generate", "--model", "M", "--prompts", "gone.jsonl"], 3, "no such file"),
    "no such text": (["generate", "--model", "M", "--prompts", "gone.txt"], 3, "gone.txt: no such file"),
    "no such path": (["generate", "--model", "M", "--prompts", "./gone.jsnl"], 3, "./gone.jsnl: no such file"),
    "empty prompt": (["generate", "--model", "M", "--prompts", " "], 3, "the prompt is empty"),
    "no such model": (["generate", "--model", "./M", "--prompts", "a b"], 4, "no such model directory or file"),
    "no output": (["generate", "--model", "M", "--prompts", "a b", "--resume"], 2, "no file is named"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_one_line_with_its_fix(rlhf: Rlhf, fault: str) -> None:
    given, code, message = FAULTS[fault]
    found, out, err = rlhf("sample", *given)
    assert (found, out) == (code, "") and message in err, err
    assert len(err.strip().splitlines()) == 1
    assert "fix: " in err or fault in (
        "n below 1",
        "temperature",
        "top-p",
        "no such file",
        "no such path",
        "no such text",
        "no such model",
    )


def test_rows_are_named_before_anything_is_drawn(rlhf: Rlhf, model: str, tmp_path: Path) -> None:
    data, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    for bad, message in (
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x" * 80}, "leaves no room"),
        ({"question": None}, "column `question` is null"),
        ({"prompt": "1", "completion": "2"}, "a column `completion` already"),
    ):
        data.write_text(json.dumps({"prompt": "1+1=?"}) + "\n" + json.dumps(bad) + "\n")
        code, _, err = rlhf(*arguments(model, str(data), output))
        assert code == 3 and f"{data}:2" in err and message in err
        assert not output.exists()


def test_what_a_sampler_returns_is_checked(
    rlhf: Rlhf, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, output = GenerateSampler.sample, tmp_path / "out.jsonl"
    for change, message in (
        (lambda found: [group[:1] for group in found], "the sampler must return 2 completions per prompt; got 1"),
        (lambda found: found[:-1], "another number of lists than there are prompts; got 0 for 1 prompts"),
        (
            lambda found: [[replace(one, score=float("nan")) for one in group] for group in found],
            "a score isn't finite",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(GenerateSampler, "sample", lambda *a, change=change, **k: change(own(*a, **k)))
            code, _, err = rlhf(*arguments(model, "1+1=? ", output, "--n", "2", "--overwrite"))
        assert code == 5 and message in err
    assert not output.exists()


def test_texts_columns_and_conversations_are_prompts(rlhf: Rlhf, model: str, tmp_path: Path) -> None:
    data, output = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    data.write_text("question,ask\nx,1+2=?\n")
    talk = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    talk.write_text(json.dumps({"messages": turns}) + "\n")
    more = ["--prompts", str(talk), "--prompts", "two words", "--dataset.columns.prompt", "ask"]
    code, _, err = rlhf(*arguments(model, str(data), output, *more))
    assert code == 0, err
    rows = read(output)
    assert [list(row)[:-3] for row in rows] == [["question", "ask"], ["messages"], ["prompt"]]
    assert rows[0]["ask"] == "1+2=?" and rows[1]["messages"] == turns and rows[2]["prompt"] == "two words"


def test_without_an_output_completions_are_printed(rlhf: Rlhf, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["sample", "generate", "--model", model, "--max-new-tokens", "4"]
    code, out, _ = rlhf(*own, "--prompts", "a: [b, c]", "--n", "2")
    assert code == 0 and out.startswith("1/1  a: [b, c]\ncompletion 1 of 2 · ") and "\ncompletion 2 of 2 · " in out
    code, out, _ = rlhf(*own, "--prompts", "a b", "--json")
    assert code == 0 and set(json.loads(out)) == {"prompt", "completion", "stop_reason", "tokens"}
    monkeypatch.setattr("sys.stdin", ["1+1=?\n", "\n", "2+2=?\n"])
    code, out, _ = rlhf(*own, "--prompts", "-", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["1+1=?", "2+2=?"]


def test_a_configuration_file_and_a_dry_run(rlhf: Rlhf, model: str, prompts: str, tmp_path: Path) -> None:
    file = tmp_path / "sample.yaml"
    file.write_text(f"method: generate\nmodel: {model}\nprompts: {prompts}\nmax_new_tokens: 3\nn: 2\n")
    code, out, _ = rlhf("sample", str(file), "--n", "1", "--dry-run")
    assert code == 0 and "# prompts: 5 rows, 1 completion each" in out
    again = tmp_path / "again.yaml"
    again.write_text(out)
    assert rlhf("sample", str(again), "--dry-run")[1] == out
    code, out, _ = rlhf("sample", str(file), "--json", "--limit=1")
    assert code == 0 and all(count <= 3 for count in json.loads(out)["tokens"])
    file.write_text(f"method: generate\nmodel: {model}\nprompts: {prompts}\ntemperture: 3\n")
    code, _, err = rlhf("sample", str(file))
    assert code == 2 and f"{file}:4" in err and "did you mean `temperature`" in err


def test_text_prompts_of_a_chat_model_are_warned_of_and_can_be_wrapped(rlhf: Rlhf, model: str) -> None:
    own = ["sample", "generate", "--model", model, "--prompts", "1+1=?", "--max-new-tokens", "4", "--json"]
    code, plain, err = rlhf(*own)
    assert code == 0 and "continued as they are" in err
    code, wrapped, err = rlhf(*own, "--dataset.wrap", "chat")
    assert code == 0 and "continued as they are" not in err and plain != wrapped
    assert json.loads(wrapped)["prompt"] == "1+1=?"
