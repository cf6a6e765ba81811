"""The schemas describe whole files: every example fits, and what a file can't hold doesn't."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import registry
from rlhf_core.cli.file_schemas import FILES, schema_of
from rlhf_core.config.yaml_file import load_yaml

jsonschema = pytest.importorskip("jsonschema")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METHODS = [f"{kind}:{name}" for kind in ("trainer", "sampler", "merger") for name in sorted(registry.View(kind))]


@cache
def validator(name: str) -> Any:
    return jsonschema.Draft202012Validator(schema_of(name))


def faults(name: str, values: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(values)]


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_fits(file: Path) -> None:
    values, _ = load_yaml(file)
    assert faults("recipe" if "stages" in values else f"trainer:{values['method']}", values) == []


@pytest.mark.parametrize("name", [*METHODS, *FILES])
def test_each_is_a_schema_that_refuses_unknown_keys(name: str) -> None:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    assert all("description" in about for key, about in schema["properties"].items() if key != "method")
    assert json.loads(json.dumps(schema)) == schema


RUN = {"model": "m", "data": "rows.jsonl"}


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("sft", {"data": ["a", {"path": "b", "weight": 2}], "eval_data": None, "output": "o", "preset": "7b"}),
        ("sft", {"data": {"path": "b"}, "lora": True, "early_stopping": False, "logging": {"samples": "hello"}}),
        (
            "sft",
            {"max_steps": "${STEPS}", "learning_rate": "${RATE:-1e-4}", "lora": {"quantize": "${BITS}", "rank": 4}},
        ),
        ("rlhf-core:sft", {}),
        ("grpo", {"rewards": "length", "generation": {"stop": "###"}, "shaping": "overlong"}),
        ("grpo", {"rewards": [{"name": "length", "weight": 2}, "regex"]}),
        ("distill", {"teacher": "t"}),
        ("distill", {"teacher": {"path": "t", "precision": "bf16"}}),
    ],
)
def test_what_a_file_may_write(method: str, values: dict[str, Any]) -> None:
    assert faults(f"trainer:{method.removeprefix('rlhf-core:')}", {"method": method, **RUN, **values}) == []


def test_a_merge_with_its_short_forms() -> None:
    models = ["a", {"model": "b", "weight": 0.4, "density": 0.3}]
    assert faults("ties", {"method": "ties", "models": models, "density": [0, 1], "base": "b", "output": "o"}) == []


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ({"lr": 1e-4}, "$: Additional properties"),
        ({"lora": {"r": 8}}, "$.lora"),
        ({"batch_size": "many"}, "$.batch_size"),
        ({"batch_size": 0}, "$.batch_size"),
        ({"precision": "bf17"}, "$.precision"),
        ({"method": "dpo"}, "$.method"),
        ({"data": [3]}, "$.data"),
        ({"dataset": {"colums": {}}}, "$.dataset"),
    ],
)
def test_what_it_may_not(values: dict[str, Any], at: str) -> None:
    (found,) = faults("sft", {"method": "sft", **RUN, **values})
    assert found.startswith(at)


def test_a_recipe_and_what_has_no_options(rlhf) -> None:
    stage = {"method": "sft", "data": "d"}
    assert faults("recipe", {"model": "m", "output": "o", "stages": [stage]}) == []
    assert faults("recipe", {"stages": []})
    assert faults("recipe", {"model": "m", "stages": [{"data": "d"}]})
    found = faults("recipe", {"model": "m", "stages": [{**stage, "learning_rat": 1}]})
    assert len(found) == 1 and "'learning_rat' was unexpected" in found[0]
    code, out, _ = rlhf("schema", "recipe")
    assert code == 0 and json.loads(out)["title"] == "Recipe of `rlhf run`"


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ({"kind": "sft", "beta": 0.1}, "'beta' was unexpected"),
        ({"kind": "train", "method": "dpo", "beta": "big"}, "$.stages[0].beta"),
        ({"method": "rlhf-core:dpo", "lora": {"r": 8}}, "$.stages[0].lora"),
        ({"method": "sft", "output": "o"}, "'output' was unexpected"),
        ({"method": "grpo", "processes": 0}, "$.stages[0].processes"),
        ({"method": "reward_model", "ensemble": {"sise": 2}}, "$.stages[0].ensemble"),
    ],
)
def test_a_training_stage_has_the_options_of_its_method(stage: dict[str, Any], at: str) -> None:
    (found,) = faults("recipe", {"model": "m", "stages": [stage]})
    assert at in found


def test_what_training_stages_may_write() -> None:
    stages: list[dict[str, Any]] = [
        {"name": "first", "kind": "sft", "data": "d", "lora": True, "max_steps": "${STEPS}"},
        {"method": "reward_model", "model": "first", "ensemble": {"size": 2}},
        {"kind": "train", "method": "rlhf-core:grpo", "reward": "reward_model", "rewards": ["length"], "processes": 2},
        {"method": "distill", "teacher": "first"},
        {"method": "acme:theirs", "anything": 1},
        {"kind": "merge", "method": "linear", "models": ["first", "grpo"]},
    ]
    assert faults("recipe", {"model": "m", "stages": stages}) == []


SAMPLE = {"kind": "sample", "prompts": "p"}


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ({"kind": "evaluate", "prompts": "p", "validater": "numeric_answer"}, "'validater' was unexpected"),
        ({"kind": "evaluate", "prompts": "p", "n": 0}, "$.stages[0].n"),
        ({"kind": "evaluate", "prompts": "p", "method": "sft"}, "'method' was unexpected"),
        ({"kind": "evaluate", "tasks": ["gsm8k"], "prompts": "p"}, "'prompts' was unexpected"),
        ({"kind": "evaluate", "tasks": ["gsm8k"], "limit": "few"}, "$.stages[0].limit"),
        ({"kind": "improve", "prompts": "p", "round": 2}, "'round' was unexpected"),
        ({"kind": "improve", "prompts": "p", "rounds": "two"}, "$.stages[0].rounds"),
        ({"kind": "improve", "prompts": "p", "flaws": {"detektors": ["x"]}}, "$.stages[0].flaws"),
        (
            {"kind": "improve", "prompts": "p", "sampler": {"method": "generate", "candidates": 2}},
            "'candidates' was unexpected",
        ),
        (
            {"kind": "improve", "prompts": "p", "sampler": {"method": "best_of_n", "candidates": "two"}},
            "sampler.candidates",
        ),
        ({"kind": "improve", "prompts": "p", "sampler": {"n": 2}}, "'method' is a required property"),
        (
            {"kind": "improve", "prompts": "p", "sampler": {"method": "generate", "model": "m"}},
            "'model' was unexpected",
        ),
        ({"kind": "improve", "prompts": "p", "train": {"learning_rat": 1}}, "'learning_rat' was unexpected"),
        ({"kind": "improve", "prompts": "p", "train": {"method": "dpo", "beta": "big"}}, "$.stages[0].train.beta"),
        ({"kind": "improve", "prompts": "p", "train": ["sft"]}, "$.stages[0].train"),
        ({**SAMPLE, "method": "generate", "candidates": 2}, "'candidates' was unexpected"),
        ({**SAMPLE, "method": "best_of_n", "candidates": "two"}, "$.stages[0].candidates"),
        ({**SAMPLE, "samplers": [{"method": "generate", "candidates": 2}]}, "$.stages[0].samplers[0]"),
        ({**SAMPLE, "samplers": [{"method": "generate"}], "repeats": 0}, "$.stages[0].repeats"),
        ({**SAMPLE, "samplers": [{"method": "generate"}], "candidate": 2}, "'candidate' was unexpected"),
        ({"kind": "merge", "method": "linear", "models": ["a"], "output": "o"}, "'output' was unexpected"),
        ({"kind": "merge", "method": "rlhf-core:ties", "models": ["a"], "densty": 0.3}, "'densty' was unexpected"),
    ],
)
def test_another_stage_has_the_options_of_its_kind(stage: dict[str, Any], at: str) -> None:
    (found,) = faults("recipe", {"model": "m", "stages": [stage]})
    assert at in found


def test_what_other_stages_may_write() -> None:
    stages: list[dict[str, Any]] = [
        {
            "kind": "evaluate",
            "prompts": ["p"],
            "validator": ["numeric_answer", {"name": "regex", "options": {"pattern": "x"}}],
        },
        {
            "kind": "evaluate",
            "prompts": "p",
            "reward": "judge",
            "reference": "first",
            "compare": "evaluate",
            "compress": None,
        },
        {"kind": "evaluate", "tasks": "gsm8k,arc", "model": "first", "limit": 3},
        {"kind": "improve", "prompts": "p", "sampler": "generate", "train": {"method": "sft"}, "flaws": {}},
        {"kind": "improve", "prompts": "p", "sampler": {"method": "generate", "n": 4}, "train": {"lora": True}},
        {
            "kind": "improve",
            "prompts": "p",
            "sampler": {"method": "refine", "seed": 3},
            "train": {"method": "acme:x", "y": 1},
        },
        {**SAMPLE, "method": "best_of_n", "reward": "judge", "candidates": 4, "compress": "${stages.c.model}"},
        {**SAMPLE, "method": "best_of_n", "reward": ["judge", {"name": "length"}], "n": 2},
        {**SAMPLE, "method": "ensemble", "members": ["a", {"path": "b"}]},
        {
            **SAMPLE,
            "samplers": [{"name": "a", "method": "generate"}, {"method": "best_of_n", "reward": "r"}],
            "max_new_tokens": 9,
        },
        {"kind": "merge", "method": "ties", "models": ["a", {"model": "b", "density": 0.3}], "evaluate": "f.py:g"},
    ]
    assert faults("recipe", {"model": "m", "stages": stages}) == []
