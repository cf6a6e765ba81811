"""A merge as it was asked for: methods and files, flags over them; every fault names its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from merge_helpers import bytes_of, tiny_family

from rlhf_core import registry
from rlhf_core.infra.errors import ConfigError
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.job import MergeJob, load_merge_job, model_flag


def load(target: str | Path, flags: str = "", **overrides: Any) -> MergeJob:
    return load_merge_job(target, overrides, flags=flags.split())


def fault(target: str | Path, flags: str = "", **overrides: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load(target, flags, **overrides)
    assert raised.value.exit_code == 2
    return raised.value.line()


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "merge.yaml"
        path.write_text(text)
        return path

    return write


def test_a_method_with_flags() -> None:
    config = load(
        "ties",
        "--base b --model x=0.5 --model y --output o --density 0.3 --scale=-1 --dtype bf16 --threads 2 --hash-inputs",
    ).config
    assert config == MergeConfig(
        method="ties",
        base="b",
        models=[{"model": "x", "weight": 0.5}, "y"],
        output="o",
        options={"density": 0.3, "scale": -1},
        dtype="bf16",
        threads=2,
        hash_inputs=True,
    )


@pytest.mark.parametrize(
    ("text", "model", "weight"),
    [
        ("a", "a", None),
        ("a=0.5", "a", 0.5),
        ("a=-1e-3", "a", -1e-3),
        ("runs/lr=0.1/model", "runs/lr=0.1/model", None),
        ("runs/lr=0.1/model=2", "runs/lr=0.1/model", 2.0),
        ("a=b", "a=b", None),
        ("a=nan", "a=nan", None),
        ("=0.5", "=0.5", None),
    ],
)
def test_a_weight_follows_the_last_equals_sign(text: str, model: str, weight: float | None) -> None:
    assert model_flag(text) == {"model": model, **({} if weight is None else {"weight": weight})}


def test_a_path_that_is_there_keeps_its_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert model_flag("lr=0.1") == {"model": "lr=0.1"}
    assert model_flag("lr=0.1=2") == {"model": "lr=0.1", "weight": 2.0}


@pytest.mark.parametrize("number", ["nan", "inf", "abc", ""])
def test_a_weight_that_is_none_is_reported(number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    for path in ("base", "base+adapter"):
        with pytest.raises(ConfigError, match=f"--model: the weight of {re.escape(path)} is not a finite number"):
            model_flag(f"{path}={number}")
    assert model_flag("base=0.1/modl") == {"model": "base=0.1/modl"}


def test_lambda_is_called_scale() -> None:
    for flags, overrides, place in ((["--lambda", "0.5"], {}, "--lambda"), ([], {"lambda": 0.5}, "command line")):
        with pytest.raises(ConfigError, match=f"{place}: unknown option `lambda` of ties; fix: λ is called `scale`"):
            load_merge_job("ties", {"models": ["a"], **overrides}, flags=flags)


@pytest.mark.parametrize("value", ["[]", [], {"gradient": []}])
def test_an_empty_list_over_the_layers_is_reported(value: object) -> None:
    flags = ["--density", value] if isinstance(value, str) else []
    options = {} if flags else {"density": value}
    with pytest.raises(ConfigError, match=r"empty list|at least one value"):
        load_merge_job("ties", {"models": ["a"], "base": "b", **options}, flags=flags)


def test_a_file_and_flags_that_win(file) -> None:
    path = file(
        "method: ties\nbase: b\ndensity: 0.3\nscale: 2\noutput: o\nmodels:\n  - x\n  - {model: y, weight: 0.5, density: 0.7}\n"
    )
    found = load(path, "--scale 3 --output p")
    assert found.config.options == {"density": 0.3, "scale": 3} and found.config.output == "p"
    assert [entry.model_dump(exclude_unset=True) for entry in found.config.models] == [
        {"model": "x"},
        {"model": "y", "weight": 0.5, "options": {"density": 0.7}},
    ]
    assert load(path, "--model z=2").config.models == [
        MergeConfig(method="m", models=["z"]).models[0].updated(weight=2.0)
    ]
    assert found.places["density"] == f"{path}:3" and found.places["scale"] == "--scale"


def test_values_by_layer_everywhere(file) -> None:
    path = file(
        """
method: ties
base: b
density: {layers: [0.1, 0.2]}
scale: [0.5, 1]
models:
  - model: x
    weight: {filters: {mlp: 0.3, attention: {gradient: [0, 1], default: 0.5}}, default: 1}
    density: [0.2, 0.4]
"""
    )
    config = load(path).config
    assert config.models[0].options["density"] == [0.2, 0.4]
    assert load("ties", "--model x --density [0.1,0.3]").config.options == {"density": [0.1, 0.3]}
    assert yaml.safe_load(load(path).to_yaml())["models"] == [
        {
            "model": "x",
            "weight": {"filters": {"mlp": 0.3, "attention": {"gradient": [0.0, 1.0], "default": 0.5}}, "default": 1.0},
            "density": [0.2, 0.4],
        }
    ]


def test_what_is_resolved_is_a_file_of_the_same_merge(file) -> None:
    for flags in (
        "ties --density [0.1,0.3] --trim_scope global",
        "dare --seed 7 --election ties",
        "breadcrumbs --compat mergekit",
    ):
        method, _, rest = flags.partition(" ")
        first = load(method, f"{rest} --base b --model x --model y=1 --output o")
        again = load(file(first.to_yaml()))
        assert again.resolved() == first.resolved()
        assert again.config.model_dump(exclude={"options"}) == first.config.model_dump(exclude={"options"})


def test_the_file_beside_a_merged_model_makes_it_again(tmp_path: Path) -> None:
    base, models = tiny_family(tmp_path, 2)
    flags = f"--base {base} --model {models[0]}=0.7 --model {models[1]} --density 0.3 --seed 3 --output {tmp_path / 'first'}"
    first = load("dare", flags)
    first.merger().merge()
    again = load(tmp_path / "first/merge.yaml", f"--output {tmp_path / 'again'}")
    assert again.config.model_copy(update={"output": None}) == first.config.model_copy(update={"output": None})
    again.merger().merge()
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "first")


@pytest.mark.parametrize(
    "name", sorted(plugin.name for plugin in registry.find("merger") if plugin.distribution == "rlhf-core")
)
def test_every_method_resolves(name: str) -> None:
    found = load(name, "--base b --model x")
    assert set(type(found.method.merger).Config.model_fields) <= set(found.resolved())


FILES = {
    "method: ties\nmodels: [x]\ndensty: 0.3\n": "merge.yaml:3: unknown option `densty` of ties; fix: did you mean `density`?",
    "method: ties\nmodels: [x]\nbsae: b\n": "merge.yaml:3: unknown option `bsae` of ties; fix: did you mean `base`?",
    "method: tis\nmodels: [x]\n": "merge.yaml:1: unknown merger `tis`; fix: did you mean `ties`?",
    "models: [x]\n": "merge.yaml: `method` is missing; fix: set it to one of: ",
    "method: sft\nmodels: [x]\n": "merge.yaml:1: unknown merger `sft`",
    "method: ties\n": "merge.yaml: `models` is missing; fix: give `--model A --model B`",
    "method: ties\nmodels: []\n": "merge.yaml:2: `models` must be a list of input models; got []",
    "method: ties\nmodels: x\n": "merge.yaml:2: `models` must be a list of input models; got 'x'",
    "method: ties\nmodels: [3]\n": "merge.yaml:2: an input model must be a name, or a group with `model`; got 3",
    "method: ties\nmodels:\n  - x\n  - {weight: 1}\n": "merge.yaml:4: `models.1.model` is missing",
    "method: ties\nmodels:\n  - x\n  - model: y\n    weigth: 1\n":
        "merge.yaml:5: unknown key `weigth` of a model; fix: did you mean `weight`?",
    "method: ties\nmodels:\n  - {model: x, scale: 1}\n":
        "merge.yaml:3: `scale` can't be set for one model in ties; fix: set it for the whole merge",
    "method: linear\nmodels:\n  - {model: x, normalize: true}\n":
        "merge.yaml:3: `normalize` can't be set for one model in linear; fix: set it for the whole merge",
    "method: linear\nmodels:\n  - model: x\n    weight: heavy\n":
        "merge.yaml:4: `models.0.weight`: must be a number; got 'heavy'",
    "method: linear\nmodels:\n  - model: x\n    weight: yes\n": "merge.yaml:4: `models.0.weight`",
    "method: linear\nmodels:\n  - model: x\n    weight: {layer: [1]}\n":
        "merge.yaml:4: unknown option `models.0.weight.layer`; fix: did you mean `layers`?",
    "method: linear\nmodels:\n  - model: x\n    weight:\n      filters: {mlp: {gradent: [1, 2]}}\n":
        "merge.yaml:5: unknown option `models.0.weight.filters.mlp.gradent`; fix: did you mean `gradient`?",
    "method: linear\nmodels:\n  - model: x\n    weight: {layers: [1], gradient: [1]}\n":
        "`layers`, `gradient` and `runs` say the same in several ways",
    "method: ties\nmodels: [x]\ndensity: 0\n": "merge.yaml:3: `density`: must be greater than 0; got 0",
    "method: ties\nmodels: [x]\ndensity: 1.5\n": "merge.yaml:3: `density`: must be less than or equal to 1; got 1.5",
    "method: dare\nmodels: [x]\ndensity: .nan\n": "merge.yaml:3: `density`: must be",
    "method: ties\nmodels: [x]\ndensity: {layrs: [1]}\n": "merge.yaml:3: unknown option `density.layrs`; fix: did you mean",
    "method: ties\nmodels: [x]\ndensity: [a]\n": "merge.yaml:3: `density.0`: must be a number; got 'a'",
    "method: ties\nmodels: [x]\nnormalize: [true]\n": "merge.yaml:3: `normalize`: must be true or false",
    "method: linear\nmodels:\n  - {model: x, weight: 1}\n  - {model: y, weight: -1}\n":
        "merge.yaml:3: weights that are normalised sum to zero; got 1, -1",
    "method: linear\nmodels:\n  - {model: x, weight: 1}\n  - {model: y, weight: -0.9}\n":
        "merge.yaml:3: weights that are normalised have mixed signs",
    "method: ties\nmodels:\n  - {model: x, weight: 1}\n  - {model: y, weight: -0.9}\n":
        "merge.yaml:3: weights that are normalised have mixed signs",
    "method: uniform_soup\nmodels:\n  - x\n  -"
    " {model: y, weight: 2}\n": "`uniform_soup` doesn't take weights: all models count equally; got 1, 2",
    "method: ties\nmodels: [x]\ndtype: int8\n": "merge.yaml:3: `dtype`: must be 'float32', 'bf16' or 'fp16'",
    "method: ties\nmodels: [x]\nthreads: 0\n": "merge.yaml:3: `threads`: must be greater than or equal to 1",
    "method: ties\nmodels: [x]\ntokenizer: base\n": "`tokenizer: base` needs a `base`",
    "method: ties\nmodels: [x]\ncompat: peft\n": "merge.yaml:3: `compat` must be `mergekit`; got 'peft'",
    "method: ties\nmodels: [x]\nmodels: [y]\n": "merge.yaml:3: duplicate key `models`",
}  # fmt: skip


@pytest.mark.parametrize("text", FILES)
def test_what_is_wrong_in_a_file_is_reported_with_its_line(file, text: str) -> None:
    assert FILES[text] in fault(file(text))


FLAGS = {
    "--model x --densty 1": "error[config] --densty: unknown option `densty` of ties; fix: did you mean `--density`?",
    "--model x --ouput o": "error[config] --ouput: unknown option `ouput`; fix: did you mean `--output`?",
    "--models x": "error[config] --models: `--models` can't be set as a whole; fix: write `--model A=0.7 --model B=0.3`",
    "--model": "error[config] --model: needs a value",
    "--model x --density": "error[config] --density: needs a value",
    "--model x --density 1 --density 2": "error[config] --density: given 2 times, but it takes one value",
    "--model x y": "error[config] command line: unexpected argument; got `y`",
    "--model x=1 --model y=-1": "error[config] --model: weights that are normalised sum to zero; got 1, -1",
    "--model x --density 1.01": "error[config] --density: must be less than or equal to 1; got 1.01",
    "--model x --base b --base c": "error[config] --base: given 2 times, but it takes one value",
    "--model x --compat mergkit": "error[config] --compat: `compat` must be `mergekit`; got 'mergkit'",
    "--base b": "error[config] command line: `models` is missing",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_what_is_wrong_in_a_flag_is_reported_with_its_name(flags: str) -> None:
    assert fault("ties", flags).startswith(FLAGS[flags])


def test_weights_of_mixed_signs_are_fine_where_nothing_divides_by_them() -> None:
    assert load("task_arithmetic", "--base b --model x=1 --model y=-1").config.models[1].weight == -1
    assert load("linear", "--model x=1 --model y=-1 --normalize false").config.options == {"normalize": False}


def test_from_python() -> None:
    config = load("ties", base="b", models=["x", {"model": "y", "weight": 2}], density=0.3).config
    assert config.options == {"density": 0.3} and config.models[1].weight == 2
    assert "unknown option `densty` of ties" in fault("ties", models=["x"], densty=0.3)
