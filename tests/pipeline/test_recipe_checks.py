"""A wrong recipe is refused before anything runs, with all of its mistakes, each where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.cli import main
from rlhf_core.infra.errors import DataError, RLHFError
from rlhf_core.pipeline.pipeline_plan import PipelinePlan
from rlhf_core.pipeline.recipe import RecipeError, read_recipe
from rlhf_core.pipeline.stage_costs import stage_costs

ROOT = Path(__file__).parents[2]

BAD = """\
model: model
output: out
defaults: {batch_size: 4, batchsize: 4}
stages:
  - {method: sft, data: preference.jsonl}
  - {method: dpoo, data: preference.jsonl}
  - {name: opt, method: dpo, data: sft.jsonl, beta: -1, betta: 2, learning_rate: fast}
  - {method: grpo, data: missing.jsonl, reward: judge}
  - {name: judge, method: reward_model, data: preference.jsonl}
  - {kind: sample, name: drawn, method: best_of_m, prompts: prompt.jsonl}
  - {kind: merge, method: linear, models: [opt, judje]}
  - {name: again, method: grpo, data: prompt.jsonl, model: judge, rewards: [length]}
  - {kind: evaluete}
  - {name: opt, method: sft, data: sft.jsonl}
  - {name: weird, method: sft, data: "${stages.drawn.model}", model: "${stage.opt}"}
"""


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_all_mistakes_are_shown_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.yaml").write_text(BAD)
    assert main(["validate", "bad.yaml"]) == 2
    found = lines(capsys)

    def said(*texts: str) -> bool:
        return any(all(text in line for text in texts) for line in found)

    # Unknown method, with the nearest; the line of the recipe and the stage.
    assert said("bad.yaml:6", "`dpoo`", "did you mean `dpo`?")
    assert said("bad.yaml:10", "`best_of_m`", "did you mean `best_of_n`?")
    assert said("bad.yaml:13", "`evaluete`", "did you mean `evaluate`?")
    # Wrong record: which one the method consumes, and which one the rows are.
    assert said("error[data]", "bad.yaml:7", "`dpo` consumes", "`preference` (prompt, chosen, rejected)", "`sft`")
    assert said("error[data]", "bad.yaml:5", "`sft` consumes", "`preference`")
    # Every wrong option of one stage.
    assert said("bad.yaml:7", "`beta`", "stage `opt`") and said("`betta`") and said("`learning_rate`", "'fast'")
    # A file that isn't there, a model that no earlier stage makes, or a later one does.
    assert said("error[data]", "bad.yaml:8", "missing.jsonl")
    assert said("bad.yaml:8", "needs what the stage `judge` makes, which comes later")
    assert said("bad.yaml:11", "a stage `judje`", "did you mean `judge`?")
    # A reward model where a policy is trained.
    assert said("bad.yaml:12", "must be a policy", "`grpo`")
    assert said("bad.yaml:14", "two stages are named `opt`")
    assert said("bad.yaml:15", "(sample best_of_m) makes no `model`", "`rows`") and said(
        "${stage.opt}", "isn't a reference"
    )
    assert not (folder / "out").exists()


def test_a_default_that_no_method_has_is_a_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one.yaml").write_text(
        "model: model\noutput: out\ndefaults: {batchsize: 4}\nstages:\n  - {method: sft, data: sft.jsonl}\n"
    )
    assert main(["validate", "one.yaml"]) == 2
    (line,) = lines(capsys)
    assert "one.yaml:3" in line and "did you mean `batch_size`?" in line


def test_data_alone_give_the_exit_code_of_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one.yaml").write_text("model: model\noutput: out\nstages:\n  - {method: dpo, data: sft.jsonl}\n")
    assert main(["run", "one.yaml"]) == 3
    assert len(lines(capsys)) == 1 and not (folder / "out").exists()


def test_wrong_keys_of_the_recipe_are_named_with_their_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one.yaml").write_text(
        "modle: model\noutput: out\nseed: -1\nstages:\n  - {method: sft, data: sft.jsonl}\n"
    )
    assert main(["validate", "one.yaml"]) == 2
    found = lines(capsys)
    assert any("one.yaml:1" in line and "did you mean `model`?" in line for line in found)
    assert any("one.yaml:3" in line and "`seed`" in line for line in found)


def test_a_model_that_is_not_there_is_named_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one.yaml").write_text(
        "model: ./modell\noutput: out\nstages:\n  - {method: sft, data: sft.jsonl}\n"
        "  - {name: two, method: sft, data: sft.jsonl, model: ./nothing}\n"
    )
    assert main(["validate", "one.yaml"]) == 4
    found = lines(capsys)
    assert len(found) == 2 and "did you mean model?" in found[0] and "one.yaml:5" in found[1]


def test_a_good_recipe_is_shown_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "good.yaml").write_text(
        "model: model\noutput: out\nstages:\n  - {method: sft, data: sft.jsonl}\n"
        "  - {name: judge, method: reward_model, data: preference.jsonl, model: sft}\n"
        "  - {method: grpo, data: prompt.jsonl, reward: judge, group_size: 2}\n"
        "  - {kind: merge, method: linear, models: [sft, {model: grpo, weight: 2}]}\n"
    )
    assert main(["run", "good.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "rlhf-core:grpo" in out and "sft.model, judge.model" in out and "ok: good.yaml" in out
    assert not (folder / "out").exists()


def test_what_a_pipeline_would_refuse_of_its_directory_is_told_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "one.yaml").write_text("model: model\noutput: mine\nstages: [{method: sft, data: sft.jsonl}]\n")
    (folder / "mine").mkdir()
    assert main(["validate", "one.yaml"]) == 0
    assert "output: mine (new)\n" in capsys.readouterr().out
    (folder / "mine" / "thesis.tex").touch()
    for command in (["validate", "one.yaml"], ["run", "one.yaml", "--dry-run"], ["run", "one.yaml"]):
        for more in [[], ["--overwrite"]] if command[0] == "run" else [[]]:
            assert main([*command, *more]) == 7
            (line,) = lines(capsys)
            assert line.endswith(
                "is not empty and not a pipeline's directory, so it is neither continued nor removed; got thesis.tex; fix: choose"
                " an empty or a new directory"
            )
    (folder / "mine" / "thesis.tex").unlink()
    (folder / "mine" / "pipeline.json").write_text('{"stages": []}')
    for more, state in (
        ([], "holds an earlier pipeline: needs --resume or --overwrite"),
        (["--resume"], "continued"),
        (["--overwrite"], "replaced"),
    ):
        assert main(["run", "one.yaml", "--dry-run", *more]) == 0
        assert f"output: mine ({state})\n" in capsys.readouterr().out
    (folder / "sft.jsonl").rename(folder / "mine" / "sft.jsonl")
    (folder / "one.yaml").write_text("model: model\noutput: mine\nstages: [{method: sft, data: mine/sft.jsonl}]\n")
    for more in (["--dry-run"], []):
        assert main(["run", "one.yaml", "--overwrite", *more]) == 2
        assert "lies in the directory that is replaced" in lines(capsys)[0]


def errors_of(*stages: dict[str, object]) -> list[RLHFError]:
    return PipelinePlan(read_recipe({"model": "model", "output": "out", "stages": list(stages)})).check()


def test_places_of_a_recipe_from_python(folder: Path) -> None:
    (one,) = errors_of({"method": "sft", "data": "sft.jsonl", "lora": {"rank": 0}})
    assert one.place == "recipe: stages[0].lora.rank (stage `sft`)"


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ({"method": "sft", "data": "sft.jsonl", "processes": 0}, "`processes`"),
        ({"method": "sft", "data": "sft.jsonl", "output": "x"}, "no `output`"),
        ({"method": "sft"}, "`data` is missing"),
        ({"method": "grpo", "data": "prompt.jsonl", "reward": "length"}, "must be the name of a stage"),
        ({"name": "a", "method": "sft", "data": "sft.jsonl", "model": "a"}, "what it makes itself"),
        ({"kind": "sample", "samplers": "generate", "prompts": "prompt.jsonl"}, "must be a list of groups"),
        ({"kind": "sample", "samplers": 4, "prompts": "prompt.jsonl"}, "must be a list of groups"),
        ({"kind": "sample", "samplers": ["generate", 3], "prompts": "prompt.jsonl"}, "must be a list of groups"),
        ({"kind": "sample", "method": "generate"}, "`prompts` is missing"),
        ({"kind": "merge", "method": "linear"}, "`models` is missing"),
        ({"kind": "improve", "prompts": "prompt.jsonl", "train": "dpo"}, "consumes `preference`"),
        ({"kind": "improve", "prompts": "prompt.jsonl", "sampler": "generat"}, "did you mean `generate`?"),
        ({"kind": "improve", "prompts": "prompt.jsonl", "check": "nomeric_answer"}, "did you mean `numeric_answer`?"),
        ({"name": "a/b", "method": "sft", "data": "sft.jsonl"}, "letters, digits"),
        ({"kind": "sft", "method": "dpo", "data": "sft.jsonl"}, "has one method"),
    ],
)
def test_each_kind_of_stage_says_what_is_wrong(folder: Path, stage: dict[str, object], text: str) -> None:
    assert any(text in str(error) for error in errors_of(stage)), [str(error) for error in errors_of(stage)]


def test_python_gets_all_mistakes_in_one_error(folder: Path) -> None:
    from rlhf_core import RLHFOrchestrator

    (folder / "bad.yaml").write_text(BAD)
    with pytest.raises(RecipeError, match="mistakes in the recipe") as raised:
        RLHFOrchestrator("bad.yaml").run_full_pipeline()
    assert len(raised.value.errors) >= 14


def test_the_files_of_a_pattern_are_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows").mkdir()
    (folder / "rows/a.jsonl").write_text((folder / "preference.jsonl").read_text())
    (folder / "bad.yaml").write_text("model: model\noutput: out\nstages: [{method: sft, data: rows/*.jsonl}]\n")
    assert main(["validate", "bad.yaml"]) == 3
    assert "`sft` consumes rows of the record type `sft`" in capsys.readouterr().err


SFT = {"method": "sft", "data": "sft.jsonl"}
BY_JUDGE = [{"name": "judge", "options": {"model": "${stages.sft.model}"}}]


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ({"method": "grpo", "data": "prompt.jsonl", "reward": "sft"}, True),
        ({"method": "grpo", "data": "prompt.jsonl", "rewards": BY_JUDGE}, False),
        ({"kind": "sample", "method": "best_of_n", "prompts": "prompt.jsonl", "reward": "sft"}, True),
        (
            {"kind": "sample", "prompts": "prompt.jsonl", "samplers": [{"method": "best_of_n", "reward": ["sft"]}]},
            True,
        ),
        ({"kind": "evaluate", "prompts": "prompt.jsonl", "reward": "sft"}, True),
        ({"kind": "evaluate", "prompts": "prompt.jsonl", "reward": BY_JUDGE}, False),
    ],
)
def test_a_policy_is_no_reward_model_but_may_be_a_judge(folder: Path, stage: dict[str, object], wrong: bool) -> None:
    found = [str(error) for error in errors_of(SFT, stage)]
    assert any("must be a reward model" in error for error in found) == wrong, found


MANY = """\
model: 3
outputt: out
seed: -1
defaults: {batch_size: 4, batchsize: 4}
capabilities:
  threshold: -1
  suites:
    - {name: a, prompts: missing-a.jsonl, validator: numeric_answer}
    - {name: b, prompts: prompt.jsonl, validator: nomeric_answer}
    - {name: c, prompts: prompt.jsonl, validator: numeric_answer, limit: 0}
    - {name: d, prompts: missing-d.jsonl, validator: lenght}
stages:
  - 3
  - {name: judge, kind: [x], data: preference.jsonl}
  - {method: dpoo, data: preference.jsonl}
  - {name: a/b, method: dpo, data: missing.jsonl}
  - {name: twice, method: sft, data: sft.jsonl, epochs: -1, rewardz: 1, dat: 2}
  - {name: twice, method: sft, data: preference.jsonl}
  - {method: grpo, data: prompt.jsonl, reward: judge, group_size: 0, rewards: [lenght, nomeric_answer]}
  - {kind: improve, name: better, prompts: gone.jsonl, rounds: 0, at_least: much,
     check: nomeric_answer, sampler: {method: generat}, train: {method: sft, epochs: -1, epoch: 1}}
  - {kind: sample, name: drawn, method: best_of_n, prompts: gone.jsonl, max_new_tokens: 0, n: 0, reward: lenght}
  - {kind: evaluate, prompts: gone.jsonl, validator: nomeric_answer, reward: lenght, n: 0, kll: 2}
"""


def test_no_mistake_hides_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "many.yaml").write_text(MANY)
    assert main(["validate", "many.yaml"]) == 2
    found = lines(capsys)

    def said(line: int, *texts: str) -> bool:
        at = f"many.yaml:{line}"
        return any(f"{at}:" in one or f"{at} " in one for one in found if all(text in one for text in texts))

    # Keys of the recipe; suites, each for itself; entries that are no stage.
    assert said(1, "`model`") and said(2, "did you mean `output`?") and said(3, "`seed`") and said(4, "`batch_size`")
    assert said(6, "`capabilities.threshold`") and said(10, "`capabilities.suites.2.limit`")
    assert said(5, "suite `a`", "missing-a.jsonl") and said(5, "suite `b`", "did you mean `numeric_answer`?")
    assert said(5, "suite `d`", "missing-d.jsonl") and said(5, "suite `d`", "did you mean `length`?")
    assert said(13, "must be a group of options", "got 3") and said(14, "`kind` must be a name")
    assert said(15, "did you mean `dpo`?")
    # A stage is checked whatever is wrong with its name, and one that needs a lost stage isn't blamed for that.
    assert said(16, "got `a/b`") and said(16, "missing.jsonl") and said(18, "two stages are named `twice`")
    assert said(18, "`sft` consumes") and not any("a stage `judge`" in line for line in found)
    # Several mistakes of one stage.
    assert said(17, "`epochs`") and said(17, "`rewardz`") and said(17, "`dat`")
    assert (
        said(19, "`group_size`") and said(19, "did you mean `length`?") and said(19, "did you mean `numeric_answer`?")
    )
    assert (
        all(said(line, "gone.jsonl") for line in (20, 22, 23))
        and said(20, "`rounds`")
        and said(20, "`at_least`")
        and said(21, "did you mean `generate`?")
    )
    assert said(21, "did you mean `numeric_answer`?") and said(21, "`epochs`") and said(21, "`epoch`")
    assert said(22, "`n`") and said(22, "`max_new_tokens`") and said(22, "did you mean `length`?")
    assert said(23, "did you mean `numeric_answer`?") and said(23, "did you mean `length`?")
    assert said(23, "`n`") and said(23, "`kll`") and not (folder / "output").exists()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (3, "`data`: must be a path or hub name, or a list of such; got 3"),
        (["sft.jsonl", 3], "`data.1`: must be a path or hub name, or `{path: …, weight: …}`; got 3"),
        ([{"path": "sft.jsonl", "weight": 0}], "`data.0.weight`: must be greater than 0; got 0"),
        ({"path": "sft.jsonl", "wait": 2}, "unknown option `data.0.wait`; fix: did you mean `weight`?"),
    ],
)
def test_data_of_a_wrong_kind_are_one_mistake(folder: Path, data: object, text: str) -> None:
    (one,) = errors_of({"method": "sft", "data": data})
    assert text in str(one)


def test_defaults_are_compared_with_the_method_that_was_meant(folder: Path) -> None:
    recipe = {"model": "model", "output": "out", "defaults": {"betta": 1, "beta": 0.2}}
    stages = [{"method": "dpoo", "data": "preference.jsonl"}]
    found = [str(one) for one in PipelinePlan(read_recipe({**recipe, "stages": stages})).check()]
    assert len(found) == 2 and any("has the option `betta`" in one for one in found)
    # Of a method that can't be guessed no options are known.
    stages = [{"method": "zzzz", "data": "preference.jsonl"}]
    assert len(PipelinePlan(read_recipe({**recipe, "stages": stages})).check()) == 1


def test_a_directory_is_no_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    (folder / "out/recipe.yaml").write_text("")
    for words in (["validate", "out"], ["validate", "./out"], ["train", "out"], ["run", "out"]):
        assert main(words) == 2
        assert "out: is a directory, not a file; fix: name the file in it, out/recipe.yaml" in lines(capsys)[0], words


def test_rows_are_written_nowhere_without_an_output(folder: Path) -> None:
    from rlhf_core import RLHFOrchestrator

    with pytest.raises(RecipeError, match="`output` is missing"):
        RLHFOrchestrator({"model": "model"}).run_sft([{"prompt": "a", "response": "b"}])
    assert not (folder / "output.data").exists()


@pytest.mark.slow
def test_tasks_of_lm_eval_are_checked_too(folder: Path) -> None:
    stage = {"kind": "evaluate", "tasks": "sums", "limit": 0, "num_fewshto": 1, "validator": "length", "compare": "sft"}
    found = [str(one) for one in errors_of(SFT, stage)]
    for text in ("`limit`", "did you mean `num_fewshot`?", "`validator` isn't for tasks of lm-eval", "no `compare`"):
        assert any(text in one for one in found), (text, found)
    assert any("lm-eval isn't installed" in one or "lm-eval has no such task" in one for one in found)


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_examples_lack_nothing_but_their_data(folder: Path, recipe: Path) -> None:
    errors = PipelinePlan(read_recipe(recipe, {"model": "model"})).check()
    assert errors and all(isinstance(one, DataError) and "no such file" in str(one) for one in errors), errors


def test_the_time_of_tiny_stages_is_that_of_their_processes(folder: Path) -> None:
    suite = {"name": "sums", "prompts": "reasoning.jsonl", "validator": "numeric_answer", "limit": 8}
    stages = [
        {"method": "sft", "data": "sft.jsonl", "max_steps": 1, "batch_size": 1},
        {"kind": "evaluate", "prompts": "reasoning.jsonl", "validator": "numeric_answer", "max_new_tokens": 4, "limit": 2},
        {"kind": "improve", "prompts": "prompt.jsonl", "check": "numeric_answer", "rounds": 2,
         "sampler": {"method": "generate", "n": 2, "max_new_tokens": 4, "limit": 2}},
    ]  # fmt: skip

    def seconds(**keys: object) -> list[float]:
        recipe = {"model": "model", "output": "out", "stages": stages, **keys}
        found = [one.seconds for one in stage_costs(PipelinePlan(read_recipe(recipe)))]
        return [one for one in found if one is not None]

    sft, evaluate, improve = seconds()
    assert 4 <= sft < 5 and 4 <= evaluate < 5 and 24 <= improve < 26
    # The tests of a stage that makes a policy are a process of their own.
    tested = seconds(capabilities={"suites": [suite]})
    assert tested == pytest.approx([sft + 4, evaluate, improve + 4], abs=1)


def test_the_evaluation_that_one_is_compared_with_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {"kind": "evaluate", "name": "before", "prompts": "prompt.jsonl"}
    after = before | {"name": "after"}
    assert not errors_of(before, after | {"compare": "before"})
    (near,) = errors_of(before, after | {"compare": "befor"})
    assert "`befor`" in str(near) and "did you mean `before`?" in str(near)
    (other,) = errors_of(before, after | {"compare": "elsewhere/evaluation"})
    assert isinstance(other, DataError) and "elsewhere/evaluation" in str(other) and "kind `evaluate`" in str(other)
    (folder / "one.yaml").write_text(
        "model: model\noutput: out\nstages:\n  - {kind: evaluate, prompts: prompt.jsonl}\n"
    )
    assert main(["validate", "one.yaml"]) == 0
    assert "a valid recipe of 1 stage\n" in capsys.readouterr().out
