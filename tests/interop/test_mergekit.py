"""mergekit's files: read unchanged, with its defaults, gradients and filters; and refused where we can't do what they say."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merge_helpers import read_weights, tiny_family, write_weights
from safetensors.torch import save_file

from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.merging.job import MergeJob, load_merge_job
from rlhf_core.merging.layer_values import value_at

LAYERS = 3


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, model-0 … model-2, and `zero` and `one`, whose weights are all that."""
    root = tmp_path_factory.mktemp("family")
    base, _ = tiny_family(root, layers=LAYERS, hidden=16, heads=2, kv_heads=1, tie_embeddings=False)
    weights = read_weights(base)
    for name, number in (("zero", 0.0), ("one", 1.0)):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes((base / "config.json").read_bytes())
        write_weights(root / name, {key: torch.full_like(tensor, number) for key, tensor in weights.items()})
    return root


def located(text: str, family: Path) -> str:
    return re.sub(r"(?<!\w)@", f"{family}/", text)


@pytest.fixture
def load(family: Path, tmp_path: Path):
    """Read the text of a file, `@name` being the directory of a model."""

    def read(text: str, *flags: str) -> MergeJob:
        path = tmp_path / "theirs.yaml"
        path.write_text(located(text, family))
        return load_merge_job(path, flags=flags)

    return read


@pytest.fixture
def fault(load):
    def read(text: str, *flags: str) -> str:
        with pytest.raises((ConfigError, ModelError)) as raised:
            load(text, *flags)
        return raised.value.line()

    return read


TWO = """models:
  - {model: @model-0, parameters: {weight: 0.5}}
  - {model: @model-1, parameters: {weight: 0.3}}
"""
MODELS = TWO.replace("models:\n", "models:\n  - {model: @base}\n")
BASED = f"base_model: @base\n{MODELS}"
OPTIONS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"method": "task_arithmetic", "scale": 1.0},
    "ties": {
        "method": "ties", "density": 1.0, "normalize": True, "scale": 1.0, "majority": "weighted", "trim_scope": "tensor",
    },
    "dare_linear": {
        "method": "dare", "density": 1.0, "normalize": False, "scale": 1.0, "election": "none", "trim": 1.0,
    },
    "dare_ties": {
        "method": "dare", "density": 1.0, "normalize": False, "scale": 1.0, "election": "ties", "trim": 1.0,
    },
    "breadcrumbs": {
        "method": "breadcrumbs", "density": 1.0, "gamma": 0.0, "normalize": False, "scale": 1.0, "election": "none",
        "scope": "tensor",
    },
    "breadcrumbs_ties": {
        "method": "breadcrumbs", "density": 1.0, "gamma": 0.0, "normalize": False, "scale": 1.0, "election": "ties",
        "scope": "tensor",
    },
    "della": {
        "method": "della", "density": 1.0, "epsilon": 0.0, "normalize": True, "scale": 1.0, "election": "ties",
    },
    "della_linear": {
        "method": "della", "density": 1.0, "epsilon": 0.0, "normalize": False, "scale": 1.0, "election": "none",
    },
}  # fmt: skip


@pytest.mark.parametrize("method", OPTIONS)
def test_their_defaults_are_said(load, family: Path, method: str) -> None:
    config = load(f"merge_method: {method}\n{BASED}").config
    assert {"method": config.method, **config.options} == OPTIONS[method]
    assert config.base == f"{family}/base"
    assert [(entry.model, entry.weight) for entry in config.models] == [
        (f"{family}/model-0", 0.5),
        (f"{family}/model-1", 0.3),
    ]


def test_methods_that_take_no_differences_merge_their_base_too(load, family: Path) -> None:
    config = load(f"merge_method: linear\n{TWO}").config
    assert (config.method, config.options, config.base) == ("linear", {"normalize": True}, None)
    assert [entry.weight for entry in config.models] == [0.5, 0.3]
    # The base comes first, as it gives configuration and tokenizer; its weight is the one for all.
    config = load(f"merge_method: linear\nbase_model: @base\nparameters: {{weight: 2}}\n{TWO}").config
    assert [(Path(entry.model).name, entry.weight) for entry in config.models] == [
        ("base", 2),
        ("model-0", 0.5),
        ("model-1", 0.3),
    ]
    assert load(f"merge_method: linear\nbase_model: @model-1\n{TWO}").config.models[0].model == f"{family}/model-1"
    plain = "models: [{model: @model-0}, {model: @model-1}]\n"
    assert load(f"merge_method: karcher\n{plain}").config.method == "karcher"
    assert load(f"merge_method: sce\nbase_model: @base\nparameters: {{select_topk: 0.3}}\n{plain}").config.options == {
        "density": 0.3
    }
    assert load(f"merge_method: model_stock\nbase_model: @base\n{plain}").config.method == "model_stock"
    config = load(f"merge_method: multislerp\n{TWO}").config
    assert (config.method, [entry.weight for entry in config.models]) == ("karcher", [0.5, 0.3])


@pytest.mark.parametrize(
    "models", ["[{model: @model-0}]", "[{model: @base}, {model: @model-0}]", "[{model: @model-0}, {model: @base}]"]
)
def test_slerp_is_from_its_base_to_the_other(load, family: Path, models: str) -> None:
    config = load(f"merge_method: slerp\nbase_model: @base\nmodels: {models}\nparameters: {{t: 0.3}}\n").config
    assert (config.method, config.base, config.options) == ("slerp", f"{family}/base", {})
    assert [(entry.model, entry.weight) for entry in config.models] == [(f"{family}/model-0", 0.3)]


def test_parameters_of_models_win_and_those_that_agree_are_one(load) -> None:
    text = """
merge_method: ties
base_model: @base
parameters: {density: 0.4, weight: 1, lambda: 0.5, normalize: false, int8_mask: true}
models:
  - {model: @model-0, parameters: {density: 0.2}}
  - {model: @model-1, parameters: {weight: 2}}
"""
    config = load(text).config
    assert config.options["scale"] == 0.5 and config.options["normalize"] is False and "density" not in config.options
    assert [(entry.weight, entry.options) for entry in config.models] == [(1, {"density": 0.2}), (2, {"density": 0.4})]
    assert load(text.replace("density: 0.2", "density: 0.4")).config.options["density"] == 0.4
    drops = load(text.replace("ties", "dare_ties")).config
    assert [entry.options for entry in drops.models] == [{"density": 0.2}, {"density": 0.4}]


def test_what_scales_differently_is_converted(load) -> None:
    parameters = "parameters: {density: 0.5, epsilon: 0.1}\n"
    options = load(f"merge_method: della\n{parameters}{BASED}").config.options
    assert (options["density"], options["epsilon"]) == (0.5, 0.2)
    assert load(f"merge_method: della\nparameters: {{density: 0.5}}\n{BASED}").config.options["epsilon"] == 0.3
    crumbs = "merge_method: breadcrumbs\nparameters: {density: %s, gamma: %s}\n" + BASED
    assert load(crumbs % (0.5, 0.1)).config.options["gamma"] == 0.1
    assert load(crumbs % (0.95, 0.1)).config.options["gamma"] == 0.05


# What mergekit 0.1.5 gives for the weight of `one`, beside `zero` of weight 1 without normalising: seen in its output.
NAMES = {
    "embeddings": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "q0": "model.layers.0.self_attn.q_proj.weight",
    "q1": "model.layers.1.self_attn.q_proj.weight",
    "q2": "model.layers.2.self_attn.q_proj.weight",
    "up1": "model.layers.1.mlp.up_proj.weight",
    "norm1": "model.layers.1.input_layernorm.weight",
}
PLACES: dict[str, list[float]] = {
    "0.25": [0.25] * 8,
    "'0.25'": [0.25] * 8,
    "[0.5]": [0.5] * 8,
    "[0.1, 0.9]": [0.1, 0.1, 0.1, 0.1, 0.5, 0.9, 0.5, 0.5],
    "[0.1, 0.2, 0.3]": [0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.2, 0.2],
    "[{filter: self_attn, value: 0.25}, {filter: mlp, value: [0, 1]}, {value: 0.6}]": [0.6, 0.6, 0.6, 0.25, 0.25, 0.25, 0.5, 0.6],
    "[{filter: self_attn, value: 0.25}, {value: [0.1, 0.9]}]": [0.1, 0.1, 0.1, 0.25, 0.25, 0.25, 0.5, 0.5],
    "[{filter: norm, value: [0.2, 0.8]}, {value: 0.6}]": [0.6, 0.6, 0.2, 0.6, 0.6, 0.6, 0.6, 0.5],
    "[{value: 0.6}, {filter: self_attn, value: 0.25}]": [0.6] * 8,
    "[{filter: '*', value: 0.3}, {value: 0.6}]": [0.3] * 8,
    "[{filter: attention, value: 0.3}, {value: 0.6}]": [0.6] * 8,
    "[{filter: elsewhere, value: 0.3}, {value: 0.6}]": [0.6] * 8,
    "[{filter: lm_head, value: 0.3}, {filter: model.norm, value: 0.4}, {filter: layers.1., value: 0.2}, {value: 0.6}]":
        [0.6, 0.3, 0.4, 0.6, 0.2, 0.6, 0.2, 0.2],
    "[{filter: q_proj, value: 0.25}]": [0.7, 0.7, 0.7, 0.25, 0.25, 0.25, 0.7, 0.7],  # the rest: the weight for all
}  # fmt: skip


def by_place(weight: str) -> str:
    return (
        "merge_method: linear\nparameters: {normalize: false, weight: 0.7}\nmodels:\n"
        f"  - {{model: @zero, parameters: {{weight: 1}}}}\n  - model: @one\n    parameters:\n      weight: {weight}\n"
    )


@pytest.mark.parametrize("weight", PLACES)
def test_gradients_and_filters_mean_what_they_mean_there(load, weight: str) -> None:
    value = load(by_place(weight)).config.models[1].weight
    found = [value_at(value, name, LAYERS) for name in NAMES.values()]
    assert found == pytest.approx(PLACES[weight])


def test_a_filter_is_any_part_of_a_name(load) -> None:
    """`layers.1` is part of `layers.10` there, and the name of one of our groups of tensors is none of a group."""
    value = (
        load(by_place("[{filter: layers.1, value: 0.2}, {filter: head, value: 0.3}, {value: 0.6}]"))
        .config.models[1]
        .weight
    )
    names = (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.10.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    )
    assert [value_at(value, name, 12) for name in (*names, "lm_head.weight", "score.weight")] == [
        0.2,
        0.2,
        0.6,
        0.3,
        0.6,
    ]


def whole(t: str, *ranges: str) -> str:
    slices = "".join(
        f"  - sources: [{{model: @base, layer_range: {one}}}, {{model: @model-0, layer_range: {one}}}]\n"
        for one in ranges
    )
    return f"merge_method: slerp\nbase_model: @base\nparameters:\n  t: {t}\nslices:\n{slices}"


def test_slices_of_whole_models_are_models(load, fault) -> None:
    gradient = "[{filter: self_attn, value: [0.1, 0.9]}, {value: 0.5}]"
    config = load(whole(gradient, "[0, 3]")).config
    assert value_at(config.models[0].weight, NAMES["q2"], LAYERS) == 0.9
    assert len(config.models) == 1
    assert load(whole("0.5", "[0, 1]", "[1, 3]")).config.models[0].weight == 0.5
    by_slice = load(whole(gradient, "[0, 1]", "[1, 3]")).config.models
    found = [value_at(by_slice[0].weight, NAMES[name], LAYERS) for name in ("q0", "q1", "q2", "up1")]
    assert found == [0.9, 0.1, 0.9, 0.5]  # a gradient begins in each slice; over one layer it is at its end


def test_types_and_tokenizers(load, fault, family: Path) -> None:
    def config(more: str, head: str = BASED):
        return load(f"merge_method: ties\n{more}\n{head}").config

    assert config("dtype: bfloat16").dtype == "bf16"
    assert config("dtype: float32\nout_dtype: float16").dtype == "fp16"
    assert config("tokenizer_source: union").tokenizer == "union"
    assert config("tokenizer: {source: base}").tokenizer == "base"
    assert config("tokenizer: {}").tokenizer == "union"
    assert config("tokenizer_source: @model-1").tokenizer == f"{family}/model-1"
    linear = f"merge_method: linear\ntokenizer_source: base\nparameters: {{weight: 1}}\n{BASED}"
    assert load(linear).config.tokenizer == f"{family}/base"  # a linear merge has no base: the path says the same
    for more, message in {
        "dtype: int8": "`dtype`: must be 'float32', 'bfloat16' or 'float16'; got 'int8'",
        "dtype: bfloat16\nout_dtype: float32": "`dtype` narrower than `out_dtype`",
        "tokenizer: {tokens: {a: {source: b}}}": "`tokenizer.tokens` is not supported",
        "tokenizer: {}\ntokenizer_source: base": "not both",
    }.items():
        assert message in fault(f"merge_method: ties\n{more}\n{BASED}")


def test_an_adapter_stands_on_the_base_that_the_file_names(load, family: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    rows, columns = read_weights(family / "base")[f"{name}.weight"].shape
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"lora_A": torch.ones(1, columns), "lora_B": torch.ones(rows, 1)}
    save_file(
        {f"base_model.model.{name}.{key}.weight": value for key, value in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": "nowhere"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    job = load(
        f"merge_method: linear\nmodels:\n  - {{model: @zero+{adapter}, parameters: {{weight: 1}}}}\n"
        "  - {model: @one, parameters: {weight: 3}}\n",
        "--output",
        str(tmp_path / "out"),
    )
    job.merger().merge()
    merged = read_weights(tmp_path / "out")
    assert merged[f"{name}.weight"].unique().tolist() == [0.75 + 0.25 * 2]
    assert merged["lm_head.weight"].unique().tolist() == [0.75]


ONE = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: "
FAULTS = {
    "merge_method: nearswap\nmodels: [{model: a}]\n": "theirs.yaml:1: mergekit's method `nearswap` isn't supported",
    f"merge_method: ties\nfoo: 1\n{BASED}": "theirs.yaml:2: unknown option `foo`; fix: use one of: base_model",
    f"merge_method: ties\nparameters:\n  densty: 1\n{BASED}":
        "theirs.yaml:3: unknown parameter `densty` of ties; fix: did you mean `density`?",
    "merge_method: ties\nbase_model: b\nmodels:\n  - {model: a, parameters: {weight: 1, lambda: 2}}\n":
        "theirs.yaml:4: `lambda` can't differ between models",
    "merge_method: ties\nbase_model: b\nmodels:\n  - {model: a}\n": "ties needs `weight` for every tensor",
    ONE + "[{filter: mlp, value: 1}]}}": "linear needs `weight` for every tensor",
    ONE + "[{filter: 'mlp.*', value: 1}]}}": "part of a tensor's name",
    ONE + "[{filtr: mlp, value: 1}]}}": "an entry of `weight` needs a `value`, and may have a `filter`",
    ONE + "heavy}}": "invalid value of `weight` for mergekit",
    f"merge_method: ties\nparameters: {{rescale: true}}\n{BASED}": "ties is supported only with `rescale: false`",
    f"merge_method: dare_ties\nparameters: {{rescale: false}}\n{BASED}": "dare_ties is supported only with `rescale: true`",
    "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a, parameters: {weight: [0, 1], normalize: true}}]\n":
        "`normalize` can't differ between models",
    "merge_method: task_arithmetic\nbase_model: b\nparameters: {normalize: true, weight: [0, 1]}\nmodels: [{model: a}]\n":
        "theirs.yaml:3: weights that differ between layers, or sum to 0, can't be normalised",
    "merge_method: nuslerp\nbase_model: b\nparameters: {weight: 1}\nmodels: [{model: a}, {model: c}]\n":
        "nuslerp of task vectors isn't supported",
    f"merge_method: ties\nparameters: {{normalize: [true, false]}}\n{BASED}":
        "`normalize` must be true or false, the same for all tensors",
    "merge_method: ties\nbase_model: a\n": "a mergekit file needs either `models` or `slices`",
    "merge_method: ties\nbase_model: a\nmodels: [b]\n":
        "theirs.yaml:3: `models.0`: expected a group of options (model, parameters); got 'b'",
    "merge_method: ties\nbase_model: a\nmodels: [{model: b, weight: 1}]\n":
        "theirs.yaml:3: unknown option `models.0.weight`; fix: use one of: model, parameters",
    "merge_method: linear\nmodels: [{model: org/name@v2, parameters: {weight: 1}}]\n": "hub revisions (`NAME@REVISION`)",
    "merge_method: slerp\nparameters: {t: 1}\nmodels: [{model: a}, {model: b}]\n":
        "slerp takes two models, one of them the `base_model`",
    "merge_method: slerp\nbase_model: a\nparameters: {t: 1.5}\nmodels: [{model: b}]\n":
        "its weight must be from 0 (the base) to 1 (the model); got 1.5",
    f"merge_method: multislerp\n{BASED}": "multislerp of task vectors isn't supported",
    f"merge_method: ties\nparameters: {{density: 0}}\n{BASED}": "theirs.yaml:2: `density`: must be greater than 0; got 0",
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]\n":
        "weights that are normalised sum to zero",
    "merge_method: ties\nbase_model: b\nmodels: [{model: b}]\nparameters: {weight: 1}\n":
        "theirs.yaml:3: there is no model besides the base model",
    "merge_method: ties\nbase_model: b\nmodels: [{model: 3}]\n": "theirs.yaml:3: `models.0.model`: must be text; got 3",
    "merge_method: linear\nparameters: 3\nmodels: [{model: a}]\n":
        "theirs.yaml:2: `parameters`: must be a mapping, such as `{name: value}`; got 3",
    ONE + "[[1, 2]]}}": "invalid value of `weight` for mergekit; got [[1, 2]]",
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_what_cannot_be_done_is_one_line(fault, text: str) -> None:
    assert FAULTS[text] in fault(text)


def test_what_differs_is_logged_or_refused(load, fault, caplog: pytest.LogCaptureFixture) -> None:
    text = f"merge_method: dare_ties\nparameters: {{density: 0.5, int8_mask: true}}\n{BASED}"
    with caplog.at_level(logging.INFO):
        load(text)
    assert "scales the rest to the L1 norm" in caplog.text and "`int8_mask` is ignored" in caplog.text
    assert "mergekit's definition of dare_ties isn't available" in fault(text, "--compat", "mergekit")
    load(f"merge_method: ties\n{BASED}", "--compat", "mergekit")


def test_what_has_no_effect_is_logged(load, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        "merge_method: linear\nname: mine\nnormalize: false\nallow_crimes: true\nrandom_seed: 7\n"
        "parameters: {weight: 1, density: 0.5, embed_slerp: true}\n" + PLAIN
    )
    config = load(text).config
    assert config.options == {"normalize": True} and config.seed == 7
    for line in (
        "theirs.yaml:2: `name` has no effect: `--output` names the result",
        "theirs.yaml:3: `normalize` has no effect: mergekit reads parameters only under `parameters`",
        "theirs.yaml:4: `allow_crimes` has no effect: it is an option of mergekit's command",
        "theirs.yaml:6: `density` has no effect: it is no parameter of linear",
        "theirs.yaml:6: `embed_slerp` has no effect: embeddings are merged by linear, as all other tensors are",
    ):
        assert line in caplog.text


def test_a_slices_residual_weight_has_no_effect(load, caplog: pytest.LogCaptureFixture) -> None:
    load(
        "merge_method: passthrough\nslices:\n  - {sources: [{model: @model-0, layer_range: [0, 3]}], residual_weight: 0.5}\n"
    )
    assert "theirs.yaml:3: `residual_weight` has no effect (nor has it in mergekit)" in caplog.text


def test_compat_sets_the_options_of_a_merge_of_ours() -> None:
    def options(*flags: str) -> dict[str, Any]:
        return load_merge_job(
            flags[0], flags=["--model", "a", "--base", "b", "--compat", "mergekit", *flags[1:]]
        ).config.options

    crumbs = {"density": 0.5, "scale": 1.0, "gamma": 0.01, "normalize": False, "election": "none", "scope": "tensor"}
    assert options("breadcrumbs", "--density", "0.5") == crumbs
    assert options("ties")["density"] == 1.0
    assert load_merge_job("passthrough", flags=["--model", "a", "--compat", "mergekit"]).config.options == {}
    assert options("breadcrumbs", "--election", "ties")["election"] == "ties"
    for flags, message in {
        ("ties", "--trim_scope", "global"): "--trim_scope: mergekit has only `trim_scope: tensor`; got global",
        ("della",): "--compat: `compat: mergekit` isn't supported for della",
        ("uniform_soup",): "mergekit has no such method",
        (
            "ties",
            "--compat",
            "mergkit",
        ): "--compat: given 2 times, but it takes one value; got `mergekit` and `mergkit`",
    }.items():
        with pytest.raises(ConfigError) as raised:
            options(*flags)
        assert message in raised.value.line()


PEER = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for text, output in json.load(sys.stdin):
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), output, options=MergeOptions(quiet=True))
"""
PLAIN = "models: [{model: @model-0}, {model: @model-1}, {model: @model-2}]\n"
SAME = {
    "linear": f"merge_method: linear\nparameters: {{weight: 1}}\n{MODELS}",
    "linear, not normalised": f"merge_method: linear\nparameters: {{weight: 1, normalize: false}}\n{MODELS}",
    "task arithmetic, normalised": f"merge_method: task_arithmetic\nparameters: {{normalize: true}}\n{BASED}",
    "an arc by slice": whole("[{filter: mlp, value: [0, 1]}, {value: [0.2, 0.6]}]", "[0, 1]", "[1, 3]"),
    "a stack": "merge_method: passthrough\nslices: [{sources: [{model: @model-0, layer_range: [0, 2]}]}, {sources: [{model:"
        " @model-1, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]}]\n",
    "linear with its base": f"merge_method: linear\nparameters: {{weight: 1}}\n{BASED}",
    "slerp": whole("[{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.3}]", "[0, 3]"),
    "task arithmetic": f"merge_method: task_arithmetic\nparameters: {{lambda: 0.7}}\n{BASED}",
    "ties": f"merge_method: ties\nparameters: {{density: 0.3, int8_mask: true}}\n{BASED}",
    "ties, not normalised": f"merge_method: ties\nparameters: {{density: [0.3, 0.9], normalize: false, lambda: 1.5}}\n{BASED}",
    "breadcrumbs": f"merge_method: breadcrumbs\nparameters: {{density: 0.6, gamma: 0.05}}\n{BASED}",
    "breadcrumbs, most kept": f"merge_method: breadcrumbs\nparameters: {{density: 0.9375, gamma: 0.07}}\n{BASED}",
    "breadcrumbs by signs": f"merge_method: breadcrumbs_ties\nparameters: {{density: 0.6, normalize: true}}\n{BASED}",
    "dare of all": f"merge_method: dare_ties\n{BASED}",
    "della of all": f"merge_method: della\n{BASED}",
    "sce": f"merge_method: sce\nbase_model: @base\nparameters: {{select_topk: 0.4}}\n{PLAIN}",
    **{f"by place: {weight}": by_place(weight) for weight in PLACES},
}  # fmt: skip
CLOSE = {
    "nuslerp": (f"merge_method: nuslerp\n{TWO}", 2e-4),
    "karcher": (f"merge_method: karcher\n{PLAIN}", 1e-4),
}


def test_mergekit_itself_gives_the_same(family: Path, load, tmp_path: Path) -> None:
    python = os.environ.get("MERGEKIT_PYTHON")
    if not python:
        pytest.skip("MERGEKIT_PYTHON isn't set to the interpreter of an environment with mergekit")
    cases = {name: (text, 5e-7) for name, text in SAME.items()} | CLOSE
    jobs = [(located(text, family), str(tmp_path / f"theirs-{n}")) for n, (text, _) in enumerate(cases.values())]
    done = subprocess.run([python, "-c", PEER], input=json.dumps(jobs), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, (name, (text, tolerance)) in enumerate(cases.items()):
        output = tmp_path / f"ours-{number}"
        load(text, "--output", str(output)).merger().merge()
        ours, theirs = read_weights(output), read_weights(tmp_path / f"theirs-{number}")
        assert ours.keys() == theirs.keys(), name
        for key, tensor in ours.items():
            off = float((tensor - theirs[key]).abs().max() / theirs[key].abs().max().clamp_min(1e-30))
            assert off <= tolerance, f"{name}: {key} is off by {off}"


def test_a_translated_merge_is_written_as_a_file_of_ours(load, family: Path, tmp_path: Path) -> None:
    job = load(f"{SAME['ties']}dtype: bfloat16\n", "--output", str(tmp_path / "out"))
    job.merger().merge()
    written = yaml.safe_load((tmp_path / "out/merge.yaml").read_text())
    assert written["method"] == "ties" and written["dtype"] == "bf16"
    again = load_merge_job(tmp_path / "out/merge.yaml", flags=["--output", str(tmp_path / "out")])
    assert again.config.model_dump() == job.config.model_dump()
    assert {tensor.dtype for tensor in read_weights(tmp_path / "out").values()} == {torch.bfloat16}
