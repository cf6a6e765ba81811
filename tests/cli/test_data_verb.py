"""`rlhf data`: what it prints, and how it is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_core.cli.flag_wording import in_flags
from rlhf_core.testing.tiny import save_tiny

GOOD = {"prompt": "What is 2 + 2?", "response": "4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("data") / "model", layers=1, hidden=16, max_positions=64))


def _write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_are_described_without_a_model(rlhf, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", GOOD, GOOD, {"question": "What?", "answer": "That."})
    code, out, err = rlhf("data", path)
    assert (code, err) == (0, "")
    assert "record type: sft (recognised from the columns" in out
    assert "rows: 3 were read, all can be used" in out
    assert "read as: columns: `question` as prompt, `answer` as response (1 row)" in out
    assert f"duplicates: 1 row repeats an earlier one (:2 = {path}:1)" in out
    assert "characters per prompt with its longest response: median 15, mean 13.3, most 15; 5 words per row" in out
    assert "\n  15  2  █" in out
    assert "need `--model`" in out and "max_length 1" not in out


def test_rows_are_encoded_as_for_a_model(rlhf, tmp_path: Path, model: str) -> None:
    path = _write(tmp_path / "rows.jsonl", GOOD, *({**GOOD, "response": "4" * n} for n in range(2, 60)))
    code, out, err = rlhf(
        "data", path, "--method", "sft", "--model", model, "--max-length", "40", "--dataset.wrap=chat"
    )
    assert (code, err) == (0, "")
    assert "max_length 40 cuts 64.4 % of the rows; 78 would cut none" in out
    assert "<|bos|><|user|>What is 2 + 2?<|end|><|assistant|>\nresponse:\n«4<|end|>»\n" in out
    assert "note: 38 of 59 rows: truncated (:22, :23, " in out
    assert ", truncated\n" in out and "Tokens in the loss are between « and »." in out
    # The default comes from the model, as in a run.
    assert "max_length 64 cuts" in rlhf("data", path, "--model", model)[1]


def test_rows_are_encoded_with_tokens_that_a_run_would_add(rlhf, tmp_path: Path, model: str) -> None:
    path = _write(tmp_path / "rows.jsonl", GOOD)
    options = ("--model", model, "--dataset.wrap", "chat", "--dataset.chat_template", "chatml")
    code, _, err = rlhf("data", path, *options)
    assert code == 2
    assert 'a training adds them by `new_tokens: ["<|im_start|>", "<|im_end|>"]`' in " ".join(err.split())
    code, out, _ = rlhf("data", path, *options, "--new_tokens", '["<|im_start|>", "<|im_end|>"]')
    assert code == 0
    assert "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n\nresponse:\n«4<|im_end|>»" in out


def test_every_mistake_is_a_line(rlhf, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", GOOD, *({"prompt": "a", "response": ""} for _ in range(12)))
    code, out, _ = rlhf("data", path, "--method", "sft")
    assert code == 3
    assert [line.split(": ")[0] for line in out.splitlines() if line.startswith("error")] == [
        f"error[data] {path}:{number}" for number in range(2, 14)
    ]
    code, out, _ = rlhf("data", path, "--method", "sft", "--mistakes", "5")
    assert code == 3 and out.count("error[data]") == 3 and "… and 9 more: `response` is an empty response" in out


def test_a_survey_as_json(rlhf, tmp_path: Path, model: str) -> None:
    path = _write(tmp_path / "rows.jsonl", GOOD, {"prompt": "a"})
    code, out, _ = rlhf("data", path, "--json", "--model", model)
    found = json.loads(out)
    assert code == 3 and (found["rows"], found["usable_rows"], found["mistakes"]) == (2, 1, 1)
    assert found["errors"][0].startswith(f"error[data] {path}:2: no column `response`")
    assert found["lengths"]["unit"] == "tokens" and found["examples"][0]["parts"]["response"][0]["in_loss"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--beta", "1"], "error[config] --beta: unknown option `beta` of data"),
        (
            ["--method", "dpo", "--beta", "1"],
            "error[config] --beta: doesn't decide how rows are read; fix: leave it out",
        ),
        (["--batch-size", "1"], "error[config] --batch-size: doesn't decide how rows are read"),
        (["--method", "dpoo"], "error[config] registry: unknown trainer `dpoo`"),
        (["--dataset.columns.promt", "a", "--method", "sft"], "error[config] --dataset.columns.promt"),
        (["--model", "/nowhere"], "error[model] /nowhere: no such model"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(rlhf, tmp_path: Path, flags: list[str], line: str) -> None:
    code, out, err = rlhf("data", _write(tmp_path / "rows.jsonl", GOOD), *flags)
    assert (code in (2, 4), out) == (True, "") and err.startswith(line) and err.count("\n") == 1, err


def test_a_configuration_is_no_file_of_rows(rlhf) -> None:
    assert rlhf("data", "run.yaml")[2].startswith(
        "error[config] run.yaml: is a configuration, not a file of rows; fix:"
    )


def test_an_option_that_chooses_the_record_type_counts(rlhf, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", {"prompt": "a"})
    assert rlhf("data", path, "--method", "distill")[0] == 3
    code, out, _ = rlhf("data", path, "--method", "distill", "--prompts-only", "true")
    assert code == 0 and "record type: prompt\n" in out


def test_nothing_is_written_beside_the_data(rlhf, tmp_path: Path, model: str) -> None:
    _write(tmp_path / "rows.jsonl", GOOD)
    shutil.copytree(model, tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    assert rlhf("data", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"))[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_columns_are_named_by_flags_or_as_a_file_has_them(rlhf, tmp_path: Path, model: str) -> None:
    path = _write(tmp_path / "rows.jsonl", {"article": "a", "the summary": "b"}, {"article": "c", "the summary": "d"})
    flags = "give `--dataset.columns.prompt COLUMN --dataset.columns.response COLUMN`, each COLUMN one of article"
    _, out, _ = rlhf("data", path, "--method", "sft")
    assert flags in " ".join(out.split())
    for more in (["--dry-run"], []):
        code, _, err = rlhf("train", "sft", "--data", path, "--model", model, "--output", str(tmp_path / "run"), *more)
        assert code == 3 and flags in err
    file = tmp_path / "sft.yaml"
    file.write_text(f"method: sft\nmodel: {model}\ndata: {path}\noutput: {tmp_path / 'run'}\n")
    assert "set `dataset.columns` to `{prompt: COLUMN, response: COLUMN}`" in rlhf("validate", str(file))[2]
    said = in_flags('set `dataset.columns` to `{prompt: article, response: "the: summary"}`')
    assert said == "give `--dataset.columns.prompt article --dataset.columns.response 'the: summary'`"
    assert in_flags("leave `prompt` out of `dataset.columns`") == "leave out `--dataset.columns.prompt`"
    assert in_flags("say which by `columns`, such as `{prompt: a}`") == "say which by `--columns.prompt a`"
