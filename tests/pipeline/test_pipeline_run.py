"""Pipelines that run: what each stage takes and makes, what is kept on a resume, and what a rollback leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core import PolicyModel, RewardModel, RLHFOrchestrator
from rlhf_core.cli import main
from rlhf_core.improvement.capability_tests import CapabilityRegression
from rlhf_core.infra.errors import ConfigError, NumbersError, StorageError
from rlhf_core.infra.model_files import file_hashes
from rlhf_core.pipeline import stage_watch
from rlhf_core.pipeline.recipe import RecipeError
from rlhf_core.pipeline.stage_command import InProcesses, InThisProcess
from rlhf_core.training.signals import StopSignal

DEFAULTS = {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "dataset": {"wrap": "none"}}
SFT = {"method": "sft", "data": "sft.jsonl"}
JUDGE = {"name": "judge", "method": "reward_model", "data": "preference.jsonl", "model": "sft"}
DPO = {"method": "dpo", "data": "preference.jsonl", "model": "sft"}
POISON = {"name": "poison", "method": "dpo", "data": "preference.jsonl", "learning_rate": 1e30, "max_steps": 3}


def told(pipeline: RLHFOrchestrator) -> str:
    return "\n".join(pipeline.told)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_every_kind_of_stage_takes_what_earlier_ones_made(pipeline: Any, recorded: Any, folder: Path) -> None:
    drawn = {"max_new_tokens": 6, "limit": 3}
    measured = {"kind": "evaluate", "prompts": "reasoning.jsonl", "validator": "numeric_answer", "n": 2, **drawn}
    stages = [
        {"name": "before", **measured}, SFT, JUDGE,
        {"method": "grpo", "data": "prompt.jsonl", "reward": "judge", "group_size": 2, "generation": {"max_new_tokens": 6}},
        {"kind": "sample", "name": "drawn", "method": "best_of_n", "reward": "judge", "prompts": "prompt.jsonl", **drawn},
        {"kind": "sample", "name": "compared", "prompts": "reasoning.jsonl", **drawn,
         "samplers": [{"method": "generate"}, {"name": "judged", "method": "best_of_n", "reward": "judge"}]},
        {"kind": "merge", "name": "soup", "method": "linear", "models": ["sft", {"model": "grpo", "weight": 3}]},
        {"kind": "improve", "prompts": "prompt.jsonl", "check": f"{folder}/any.py:score", "at_least": 0.0,
         "sampler": {"method": "generate", "n": 2, "max_new_tokens": 6}, "train": {"max_steps": 1}},
        {"name": "after", **measured, "reward": "judge", "compare": "before"},
    ]  # fmt: skip
    (folder / "any.py").write_text("def score(prompts, completions, **columns):\n    return [1.0] * len(completions)\n")
    result = pipeline(*stages).run_full_pipeline()
    made = recorded()
    assert (
        result.exit_code == 0 and made["status"] == "done" and result.policy.endswith("08-improve/round-1/train/model")
    )
    assert {stage["status"] for stage in made["stages"].values()} == {"finished"}
    assert made["stages"]["grpo"]["input_model"] == "stages/02-sft/model"
    # The merge is the weighted mean of the two models' weights.
    sft, grpo, soup = (
        load_file(folder / f"out/stages/{name}/model/model.safetensors") for name in ("02-sft", "04-grpo", "07-soup")
    )
    name = "model.embed_tokens.weight"
    assert torch.allclose(soup[name], 0.25 * sft[name] + 0.75 * grpo[name], atol=1e-6)
    rows = [json.loads(line) for line in (folder / "out/stages/05-drawn/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all("score" in row for row in rows)
    compared = json.loads((folder / "out/stages/06-compared/comparison.json").read_text())["samplers"]
    assert [one["name"] for one in compared] == ["generate", "judged"]
    events = [json.loads(line)["event"] for line in (folder / "out/history.jsonl").read_text().splitlines()]
    assert events[0] == "pipeline_started" and events[-1] == "pipeline_done" and events.count("stage_finished") == 9
    after = made["stages"]["after"]["metrics"]
    # The reference is the policy that the evaluated one's stage began with; the first evaluation had none.
    assert {"accuracy/numeric_answer", "kl/token", "reward/reward_model"} <= after["metrics"].keys()
    assert after["differences"] and "kl/token" not in made["stages"]["before"]["metrics"]["metrics"]
    assert isinstance(PolicyModel.from_pretrained(result.policy), PolicyModel)


@pytest.mark.slow
def test_a_run_directory_of_a_stage_is_that_of_rlhf_train(pipeline: Any, folder: Path) -> None:
    pipeline(SFT, seed=5).run_full_pipeline()
    assert main(["train", "out/stages/01-sft.yaml", "--output", "alone"]) == 0
    hashes = file_hashes(str(folder / "alone/model"))
    assert hashes is not None and hashes == file_hashes(str(folder / "out/stages/01-sft/model"))


@pytest.mark.parametrize(
    ("on_error", "left"), [pytest.param("stop", "waiting", marks=pytest.mark.slow), ("continue", "finished")]
)
def test_a_stage_that_diverges_leaves_the_policy_from_before_bit_for_bit(
    pipeline: Any, recorded: Any, folder: Path, on_error: str, left: str
) -> None:
    last = {"name": "last", "method": "sft", "data": "sft.jsonl"}
    one = pipeline(SFT, POISON, last, rollback={"on_error": on_error})
    before: dict[str, str] | None = None
    if on_error == "stop":
        with pytest.raises(NumbersError, match="finite"):
            one.run_full_pipeline()
    else:
        result = one.run_full_pipeline()
        assert result.exit_code == 6 and "finite" in str(result.error)
    made = recorded()
    poison = made["stages"]["poison"]
    assert poison["status"] == "rolled_back" and "error[numbers]" in poison["reason"] and poison["exit_code"] == 6
    assert poison["output_model"] == "stages/01-sft/model" and made["exit_code"] == 6 and made["status"] == "failed"
    assert made["stages"]["last"]["status"] == left and "finite" in made["message"]
    assert made["policy"] == ("stages/01-sft/model" if on_error == "stop" else "stages/03-last/model")
    if on_error == "continue":
        assert made["stages"]["last"]["input_model"] == "stages/01-sft/model"
    before = file_hashes(str(folder / "out/stages/01-sft/model"))
    pipeline(SFT, output="fresh").run_full_pipeline()
    assert before == file_hashes(str(folder / "fresh/stages/01-sft/model"))
    assert "rolled back to stages/01-sft/model" in told(one)


@pytest.mark.slow
def test_what_needs_a_failed_stage_is_left_out(pipeline: Any, folder: Path) -> None:
    judge = {**JUDGE, "learning_rate": 1e30, "max_steps": 3}
    grpo = {"method": "grpo", "data": "prompt.jsonl", "reward": "judge", "group_size": 2}
    result = pipeline(SFT, judge, grpo, DPO, rollback={"on_error": "continue"}).run_full_pipeline()
    assert [one.status for one in result.stages] == ["finished", "failed", "skipped", "finished"]
    assert result.exit_code == 6 and "judge" in str(result.stages[2].reason) and result.policy.endswith("04-dpo/model")


def suites(folder: Path) -> dict[str, Any]:
    """Return a suite that asks for what the first model answers, which no training on other texts keeps."""
    model = PolicyModel.from_pretrained(folder / "model")
    prompts = [f"{first}+{second}=?\n" for first in range(2, 8) for second in range(2, 4)]
    answers = [only.text for (only,) in model.generate(prompts, max_new_tokens=4, temperature=0.0)]
    rows = [{"prompt": prompt, "wanted": text} for prompt, text in zip(prompts, answers, strict=True)]
    (folder / "same.py").write_text(
        "def same(prompts, completions, wanted, **columns):\n"
        "    return [float(a == b) for a, b in zip(completions, wanted)]\n"
    )
    suite = {
        "name": "as before",
        "prompts": rows,
        "validator": f"{folder}/same.py:same",
        "generation": {"max_new_tokens": 4},
    }
    return {"suites": [suite], "threshold": 5.0}


@pytest.mark.parametrize("on_regression", ["continue", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_capability_that_is_lost_rolls_back(pipeline: Any, recorded: Any, folder: Path, on_regression: str) -> None:
    harm = {"name": "harm", "method": "sft", "data": "sft.jsonl", "learning_rate": 0.3, "max_steps": 4}
    mild = {"name": "mild", "method": "sft", "data": "sft.jsonl", "learning_rate": 1e-9}
    keys = {"capabilities": suites(folder), "rollback": {"on_regression": on_regression}}
    one = pipeline(harm, mild, **keys)
    if on_regression == "stop":
        with pytest.raises(CapabilityRegression, match="as before"):
            one.run_full_pipeline()
    else:
        result = one.run_full_pipeline()
        assert result.exit_code == CapabilityRegression.exit_code and result.policy.endswith("02-mild/model")
    made = recorded()
    harmed = made["stages"]["harm"]
    assert harmed["status"] == "rolled_back" and harmed["output_model"] == "model"
    assert harmed["capabilities"]["before"]["as before"]["value"] == 1.0
    assert (
        harmed["capabilities"]["after"]["as before"]["value"] < 0.5
        and "as before" in harmed["capabilities"]["regressions"][0]
    )
    assert made["exit_code"] == CapabilityRegression.exit_code
    if on_regression == "continue":
        assert made["stages"]["mild"]["input_model"] == "model"
        assert made["stages"]["mild"]["capabilities"]["after"]["as before"]["value"] == 1.0
        # A regression is a verdict, which a resume keeps.
        again = pipeline(harm, mild, **keys)
        assert again.run_full_pipeline(resume=True).exit_code == CapabilityRegression.exit_code
        assert "rolled back before" in told(again) and "begun" not in told(again)
        # Tests that ask for other things judge the trained policy anew.
        trained = (folder / "out/stages/01-harm/run.json").stat().st_mtime_ns
        for threshold, code in ((200.0, 0), (5.0, CapabilityRegression.exit_code)):
            tests = {**keys["capabilities"], "threshold": threshold}
            judged = pipeline(harm, **{**keys, "capabilities": tests})
            assert judged.run_full_pipeline(resume=True).exit_code == code
        assert (folder / "out/stages/01-harm/run.json").stat().st_mtime_ns == trained


def test_a_resume_keeps_what_is_the_same_and_replaces_what_changed_when_told(pipeline: Any, folder: Path) -> None:
    pipeline(SFT, JUDGE, DPO).run_full_pipeline()
    with pytest.raises(StorageError, match="holds an earlier pipeline"):
        pipeline(SFT, JUDGE, DPO).run_full_pipeline()
    again = pipeline(SFT, JUDGE, DPO)
    again.run_full_pipeline(resume=True)
    assert told(again).count("finished before") == 3 and "begun" not in told(again)
    changed = {**DPO, "beta": 0.3}
    with pytest.raises(ConfigError, match="the stage `dpo` changed since it was run") as raised:
        pipeline(SFT, JUDGE, changed).run_full_pipeline(resume=True)
    assert raised.value.got == "beta: None → 0.3"
    replaced = pipeline(SFT, JUDGE, changed)
    replaced.run_full_pipeline(resume=True, overwrite=True)
    assert told(replaced).count("finished before") == 2 and "runs again: beta: None → 0.3" in told(replaced)
    # A number that doesn't change what is computed is no change.
    quiet = pipeline(SFT, JUDGE, {**changed, "micro_batch_size": 2})
    quiet.run_full_pipeline(resume=True)
    assert told(quiet).count("finished before") == 3


def test_a_stage_keeps_its_directory_wherever_it_stands_in_the_recipe(
    pipeline: Any, recorded: Any, folder: Path
) -> None:
    pipeline(SFT, DPO).run_full_pipeline()
    drawn = {"kind": "sample", "name": "SFT", "method": "generate", "prompts": "prompt.jsonl", "limit": 2}
    more = pipeline({**drawn, "max_new_tokens": 2}, SFT, DPO)
    more.run_full_pipeline(resume=True)
    assert told(more).count("finished before") == 2 and "changed" not in told(more)
    # The new stage's own would be that of `sft`, where a file system takes capital letters for small ones.
    assert {name: stage["directory"] for name, stage in recorded()["stages"].items()} == {
        "SFT": "stages/01-SFT-2", "sft": "stages/01-sft", "dpo": "stages/02-dpo"
    }  # fmt: skip
    assert recorded()["policy"] == "stages/02-dpo/model"
    fewer = pipeline(SFT, DPO)
    fewer.run_full_pipeline(resume=True)
    assert told(fewer).count("finished before") == 2


def test_a_merge_that_was_killed_before_its_report_has_its_figures(pipeline: Any, recorded: Any, folder: Path) -> None:
    soup = {"kind": "merge", "name": "soup", "method": "linear", "models": ["model", "sft"]}
    pipeline(SFT, soup).run_full_pipeline()
    whole, files = recorded()["stages"]["soup"]["metrics"], file_hashes("out/stages/02-soup/model")
    as_if_killed_in(folder, "soup")
    (folder / "out/stages/02-soup/merge.json").unlink()
    pipeline(SFT, soup).run_full_pipeline(resume=True)
    again = recorded()["stages"]["soup"]["metrics"]
    assert again["tensors"] == whole["tensors"] and again["bytes_written"] == whole["bytes_written"]
    assert file_hashes("out/stages/02-soup/model") == files


def as_if_killed_in(folder: Path, name: str, **fields: Any) -> None:
    """Change the pipeline's record to what a kill in a stage leaves."""
    values = json.loads((folder / "out/pipeline.json").read_text())
    stage = next(one for one in values["stages"] if one["name"] == name)
    stage |= {"status": "running", "ended": None, **fields}
    (folder / "out/pipeline.json").write_text(json.dumps(values | {"status": "running"}))


@pytest.mark.slow
def test_tasks_of_lm_eval_are_a_stage(pipeline: Any, recorded: Any, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `lm-eval` isn't installed")
    (folder / "tasks").mkdir()
    (folder / "tasks/sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: prompt.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n'
    )
    stage = {"kind": "evaluate", "name": "asked", "tasks": ["sums"], "include_path": "tasks", "limit": 4}
    one = pipeline(SFT, stage)
    one.run_full_pipeline()
    metrics = recorded()["stages"]["asked"]["metrics"]["metrics"]
    assert metrics["sums/exact_match,none"]["count"] == 4 and "sums/exact_match" in told(one)
    assert (folder / "out/stages/02-asked/lm_eval.json").is_file()
    again = pipeline(SFT, stage)
    again.run_full_pipeline(resume=True)
    assert told(again).count("finished before") == 2


def test_time_before_a_kill_counts(pipeline: Any, recorded: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_watch, "_BETWEEN_NOTES", 0.0)
    noted: list[float] = []

    class Here(InProcesses):
        """Runs commands in this process, and looks at the record as a kill would leave it."""

        def __call__(self, arguments: Any, *, log: Path, processes: int = 1) -> str:
            found = InThisProcess(main)(arguments, log=log, processes=processes)
            assert self.watch is not None
            self.watch.tick()
            noted.append(recorded()["stages"]["sft"]["seconds"])
            return found

    def run(**how: Any) -> None:
        recipe = {"model": "model", "output": "out", "defaults": DEFAULTS, "stages": [SFT]}
        with StopSignal(speak=False) as stop:
            RLHFOrchestrator(recipe, run=Here(stop), tell=lambda text: None).run_full_pipeline(**how)

    run()
    assert 0 < noted[0] <= recorded()["stages"]["sft"]["seconds"]
    as_if_killed_in(folder, "sft", seconds=500.0)
    run(resume=True)
    assert 500 <= recorded()["stages"]["sft"]["seconds"] < 500 + 60


@pytest.mark.slow
def test_other_data_change_a_stage_and_those_that_follow_from_it(pipeline: Any, folder: Path) -> None:
    pipeline(SFT, JUDGE, DPO).run_full_pipeline()
    rows = (folder / "sft.jsonl").read_text().splitlines(keepends=True)
    (folder / "sft.jsonl").unlink()
    (folder / "sft.jsonl").write_text("".join(rows[:12]))
    with pytest.raises(ConfigError, match="sft") as raised:
        pipeline(SFT, JUDGE, DPO).run_full_pipeline(resume=True)
    assert "the content of sft.jsonl" in str(raised.value) and "`judge`, `dpo`" in str(raised.value)
    redone = pipeline(SFT, JUDGE, DPO)
    redone.run_full_pipeline(resume=True, overwrite=True)
    assert told(redone).count("runs again") == 3 and "what ${stages.sft.model} stands for" in told(redone)


@pytest.mark.slow
def test_a_model_that_someone_changed_is_not_gone_on_with(pipeline: Any, folder: Path) -> None:
    pipeline(SFT, DPO).run_full_pipeline()
    config = folder / "out/stages/01-sft/model/generation_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(StorageError, match="its content changed"):
        pipeline(SFT, DPO).run_full_pipeline(resume=True)


@pytest.mark.slow
def test_a_failed_stage_is_tried_again_with_another_rate(pipeline: Any, folder: Path) -> None:
    with pytest.raises(NumbersError):
        pipeline(SFT, POISON).run_full_pipeline()
    mended = pipeline(SFT, {**POISON, "learning_rate": 1e-4})
    assert mended.run_full_pipeline(resume=True).exit_code == 0
    assert "finished before" in told(mended) and "learning_rate: 1e+30 → 0.0001" in told(mended)


def test_a_directory_serves_one_process_and_nothing_else(pipeline: Any, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/notes.txt").write_text("mine")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(StorageError, match="not a pipeline's directory"):
            pipeline(SFT).run_full_pipeline(**how)
    assert [path.name for path in (folder / "out").iterdir()] == ["notes.txt"]
    (folder / "out/notes.txt").unlink()
    one = pipeline(overwrite=True)
    one.run_sft("sft.jsonl")
    with pytest.raises(StorageError, match="running this pipeline"):
        pipeline(SFT).run_full_pipeline(resume=True)
    one.close()
    assert pipeline(SFT).run_full_pipeline(resume=True).exit_code == 0
    with pytest.raises(ConfigError, match="lies in the directory that is replaced"):
        pipeline({**SFT, "model": "out/stages/01-sft/model"}).run_full_pipeline(overwrite=True)


@pytest.mark.slow
def test_stage_by_stage_from_python(pipeline: Any, recorded: Any, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    with pipeline() as one:
        assert one.run_sft(rows, epochs=1.0).model == folder / "out/stages/01-sft/model"
        one.run_reward_model_training("preference.jsonl", name="judge")
        one.run_process_reward_model_training(folder / "preference.jsonl")
        generation = {"max_new_tokens": 6}
        done = one.run_policy_optimization(
            "grpo", "prompt.jsonl", reward=["judge", "process_reward"], group_size=2, generation=generation
        )
        assert done.status == "finished"
        with pytest.raises(RecipeError, match="betta"):
            one.run_policy_optimization("dpo", "preference.jsonl", betta=1)
        saved = one.save_models("models")
    assert recorded()["status"] == "done" and [*saved] == ["policy", "judge", "process_reward"]
    assert file_hashes("models/policy") == file_hashes("out/stages/04-grpo/model")
    loaded = pipeline().load_models("models")
    assert isinstance(loaded["policy"], PolicyModel) and isinstance(loaded["judge"], RewardModel)
    own = pipeline().load_models()
    assert torch.equal(*(next(models["policy"].parameters()) for models in (loaded, own)))
    # Begun again in another process, with the same stages: each is kept.
    with pipeline(resume=True) as again:
        again.run_sft(rows, epochs=1.0)
        again.run_reward_model_training("preference.jsonl", name="judge")
    assert told(again).count("finished before") == 2 and len(recorded()["stages"]) == 4


def test_models_that_were_saved_before_are_replaced_if_asked_for(pipeline: Any, folder: Path) -> None:
    made = folder / "out/stages/01-sft/model"
    made.mkdir(parents=True)
    (folder / "out/pipeline.json").write_text(
        json.dumps({"policy": "stages/01-sft/model", "model": "model", "stages": []})
    )
    (made / "weights").write_text("old")
    one = pipeline()
    saved = one.save_models("models")["policy"]
    (made / "weights").write_text("new")
    with pytest.raises(StorageError, match=r"saved before.*overwrite=True"):
        one.save_models("models")
    assert (saved / "weights").read_text() == "old"
    one.save_models("models", overwrite=True)
    assert (saved / "weights").read_text() == "new" and {*folder.glob("models*")} == {folder / "models"}
    # Anything else isn't replaced.
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="isn't an empty directory"):
        one.save_models("mine", overwrite=True)
