"""`rlhf evaluate`: a table and JSON of estimates, what is written, resuming, comparing, wrong options before a model loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import EvaluationReport
from rlhf_core.testing.tiny import save_tiny

FUNCTIONS = """
def even(completions, **columns):
    return [float(len(text) % 2 == 0) for text in completions]

def characters(completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(save_tiny(root / name, seed=seed)) for seed, name in enumerate(("model", "other"))}


@pytest.fixture(autouse=True)
def _files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scores.py").write_text(FUNCTIONS)
    rows = [{"prompt": f"{n}+{n}=?", "answer": str(2 * n), "given": "x" * n} for n in (1, 2, 17, 9)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": "a", "chosen": "longer", "rejected": "short"}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))


def written() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/completions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_table_files_and_a_comparison(rlhf, models: dict[str, str]) -> None:
    common = ["--prompts", "rows.jsonl", "--n", "2", "--max-new-tokens", "6", "--resamples", "100"]
    command = ["evaluate", "--model", models["model"], *common, "--reference", models["other"], "--baseline", models["other"],
               "--reward", "scores.py:characters", "--validator", "scores.py:even", "--preferences", "pairs.jsonl",
               "--embeddings", models["other"]]  # fmt: skip
    code, out, err = rlhf(*command, "--output", "out")
    assert code == 0, err
    report = EvaluationReport.load("out")
    shown = {line.split()[0]: line.split() for line in out.splitlines()}
    expected = (
        "kl/token kl/sequence reward_accuracy/characters pass@2/even majority@2/even ece/even brier/even self_bleu"
    )
    assert {*expected.split(), "distinct_2", "embedding_distance", "win_rate/even"} <= report.metrics.keys()
    assert report.metrics.keys() <= shown.keys() and "out/evaluation.json" in out
    assert float(shown["length"][1]) == pytest.approx(report["length"].value, rel=1e-3)
    assert [row["answer"] for row in written()] == ["2", "4", "34", "18"]
    code, out, err = rlhf("score", "scores.py:even", "--data", "out/completions.jsonl", "--json")
    assert code == 0 and json.loads(out)["mean"] == pytest.approx(report["accuracy/even"].value), err
    code, out, err = rlhf(*command, "--output", "out", "--resume", "--json")
    assert code == 0 and json.loads(out)["metrics"] == {name: one.as_json() for name, one in report.metrics.items()}
    code, _, err = rlhf(*command, "--output", "out")
    assert code == 7 and "--resume" in err
    later = ["evaluate", "--model", models["other"], *common, "--validator", "scores.py:even", "--compare", "out"]
    code, out, err = rlhf(*later, "--json")
    found = json.loads(out)
    assert code == 0 and "kl/token" not in found["metrics"], err
    apart = found["differences"]["accuracy/even"]["value"]
    assert apart == pytest.approx(found["metrics"]["accuracy/even"]["value"] - report["accuracy/even"].value)
    code, out, err = rlhf(*later, "--metrics", "accuracy,length")
    assert code == 0 and "difference" in out.splitlines()[0] and "self_bleu" not in out


def test_a_file_and_flags_and_a_dry_run(rlhf, models: dict[str, str]) -> None:
    Path("e.yaml").write_text(
        f"model: {models['model']}\nprompts: rows.jsonl\nn: 2\nvalidator: [scores.py:even]\nbaseline_column: given\n"
        "metrics: [accuracy, win_rate]\ntemperature: 0.7\n"
    )
    code, out, err = rlhf("evaluate", "e.yaml", "--n", "3", "--dry-run")
    assert code == 0 and "# prompts: 4, 3 completions each\n# metrics: accuracy, win_rate\n" in out, err
    assert "temperature: 0.7" in out
    Path("again.yaml").write_text(out)
    assert rlhf("evaluate", "again.yaml", "--dry-run")[1] == out
    for done, state in ((False, "new"), (True, "exists: needs --resume or --overwrite")):
        if done:
            Path("there").mkdir()
            Path("there/completions.jsonl").write_text("{}\n")
        assert f"# output: there ({state})\n" in rlhf("evaluate", "e.yaml", "--output", "there", "--dry-run")[1]
    for more in (["--dry-run"], []):
        code, _, err = rlhf("evaluate", "e.yaml", "--output", "e.yaml", *more)
        assert code == 7 and err.startswith("error[io] e.yaml: is a file, not a directory")
    code, out, err = rlhf("evaluate", "e.yaml", "--max-new-tokens", "4", "--json", "--limit", "2")
    assert code == 0 and json.loads(out)["metrics"]["win_rate/even"]["count"] == 2, err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "`model` is missing"),
        (["--model", "m"], 2, "`prompts` is missing"),
        (["--metrics", "kl"], 2, "`kl` can't be measured: there is no reference"),
        (["--metrics", "klx"], 2, "must be 'length'"),
        (["--validator", "exact_mach"], 2, "exact_match"),
        (["--referense", "m"], 2, "did you mean `--reference`?"),
        (["--referense", "m"], 2, "`rlhf evaluate --help` lists them"),
        (["--judge", "m"], 2, "`judge` compares with a baseline"),
        (["--n", "0"], 2, "greater than or equal to 1"),
        (["--resume"], 2, "no file is named"),
        (["--preferences", "none.jsonl"], 3, "none.jsonl"),
        (["--compare", "none"], 3, "there is no evaluation"),
        (["rows.yaml"], 2, "first"),
        (["e.yaml"], 3, "e.yaml"),
    ],
)
def test_what_is_refused_before_a_model_loads(rlhf, arguments: list[str], code: int, said: str) -> None:
    """The model doesn't exist, and nothing says so: the error comes first."""
    given = [] if arguments in ([], ["--model", "m"]) else ["--model", "/absent", "--prompts", "rows.jsonl"]
    file = [one for one in arguments[:1] if one.endswith(".yaml")]
    found, _, err = rlhf("evaluate", *file, *given, *arguments[len(file) :])
    if file:
        assert found != 0 and file[0] in err
    else:
        assert found == code and said in err, err


def test_an_argument_that_is_no_file_is_refused(rlhf) -> None:
    code, _, err = rlhf("evaluate", "generate", "--model", "m")
    assert code == 2 and "nor a YAML file" in err
