"""What a method sees of each model: in the order given, with name, path, weight and options of any type of its own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from merge_helpers import bytes_of, merge, read_weights, tiny_family, write_weights
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.infra.errors import ConfigError, ModelError, PluginError
from rlhf_core.merging import Chunk, MergeConfig, Merger, MergeResult, ModelMerger, TensorStream, merge_tensor
from rlhf_core.merging.job import load_merge_job
from rlhf_core.merging.tensor_reader import MemoryTensor


class ImportanceConfig(BaseConfig):
    """Options of importance-weighted merging."""

    importance: Path | None = Field(None, description="File with each entry's importance, a tensor of every name.")
    power: float = Field(1.0, description="Exponent of importances; larger lets the larger ones count more.")
    parts: list[str] = Field(
        default_factory=list, description="Parts of names that a model takes part in; empty means all."
    )
    shift: dict[str, float] = Field(default_factory=dict, description="Part of a name → what is added there.")
    kind: Literal["plain", "none"] = Field("plain", description="Whether importances count.")


class Importance(Merger):
    """Mean of models, each entry weighed by what its model's own file says (Fisher merging, Matena & Raffel 2022)."""

    api = 1
    Config = ImportanceConfig
    config: ImportanceConfig
    per_model = ("importance", "power", "parts", "shift", "kind")

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        SEEN.setdefault(chunk.name, [(one.name, one.path, one.weight, one.index) for one in chunk.inputs])
        total, divisor = torch.zeros_like(chunk.tensors[0]), torch.zeros_like(chunk.tensors[0])
        for one, tensor in zip(chunk.inputs, chunk.tensors, strict=True):
            importance = torch.full_like(tensor, one.weight)
            if one.options["importance"] is not None and one.options["kind"] == "plain":
                importance *= chunk.cut(load_file(one.options["importance"])[chunk.name]) ** one.options["power"]
            if one.options["parts"] and not any(part in chunk.name for part in one.options["parts"]):
                continue
            shift = sum(value for part, value in one.options["shift"].items() if part in chunk.name)
            total += importance * (tensor + shift)
            divisor += importance
        return total / divisor.clamp_min(1e-12)


SEEN: dict[str, list[tuple[str, Path | None, float, int]]] = {}


@pytest.fixture
def models(tmp_path: Path) -> list[dict[str, Any]]:
    """Three models, each with a file of importances."""
    SEEN.clear()
    registry.register("merger", "importance", Importance)
    entries = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        write_weights(tmp_path / f"model-{number}", weights)
        file = tmp_path / f"importance-{number}.safetensors"
        save_file({name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}, file)
        entries.append(
            {"model": str(tmp_path / f"model-{number}"), "weight": 1.0 + number, "options": {"importance": str(file)}}
        )
    return entries


SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (300, 300),
    "model.layers.1.mlp.up_proj.weight": (7, 5),
    "model.norm.weight": (9,),
}


def expected(entries: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the merge in float64, computed by itself."""
    found = {}
    for name in SHAPES:
        parts = [
            (entry["weight"] * load_file(entry["options"]["importance"])[name].double(), read(entry, name))
            for entry in entries
        ]
        found[name] = sum(share * values for share, values in parts) / sum(share for share, _ in parts)
    return found  # type: ignore[return-value]


def read(entry: dict[str, Any], name: str) -> Tensor:
    return read_weights(Path(entry["model"]))[name].double()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("commutative", [False, True])
def test_each_model_gets_its_own_file_in_every_order(
    models: list[dict[str, Any]], tmp_path: Path, threads: int, commutative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Importance, "commutative", commutative)
    wanted = expected(models)
    found = []
    for number, order in enumerate(itertools.permutations(models)):
        merge("importance", order, tmp_path / f"out-{number}", threads=threads)
        for name, tensor in read_weights(tmp_path / f"out-{number}").items():
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-5)
        found.append(bytes_of(tmp_path / f"out-{number}"))
    assert not commutative or all(one == found[0] for one in found)


def test_a_method_sees_models_in_the_order_given_with_name_path_and_weight(
    models: list[dict[str, Any]], tmp_path: Path
) -> None:
    for number, order in enumerate(itertools.permutations(models)):
        SEEN.clear()
        merge("importance", order, tmp_path / f"out-{number}", threads=1)
        for seen in SEEN.values():
            assert seen == [
                (entry["model"], Path(entry["model"]), entry["weight"], place) for place, entry in enumerate(order)
            ]
        assert set(SEEN) == set(SHAPES)


def test_a_commutative_method_has_them_in_an_order_of_their_own(
    models: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Importance, "commutative", True)
    seen = set()
    for number, order in enumerate(itertools.permutations(models)):
        SEEN.clear()
        merge("importance", order, tmp_path / f"out-{number}", threads=1)
        seen |= {tuple(name for name, *_ in one) for one in SEEN.values()}
        for place, entry in enumerate(order):
            assert all((entry["model"], Path(entry["model"]), entry["weight"], place) in one for one in SEEN.values())
    assert len(seen) == 1


def test_options_of_any_type_from_files_and_flags(models: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second, _ = models
    file = tmp_path / "merge.yaml"
    file.write_text(
        f"""
method: importance
models:
  - {{model: {first["model"]}, parts: [layers.0, norm], power: [1, 3], kind: none}}
  - {{model: {second["model"]}, importance: {second["options"]["importance"]}, shift: {{norm: 2}}}}
power: 2
"""
    )
    flags = "--models.0.importance x.safetensors --models.0.kind plain --models.1.parts norm --models.1.parts mlp"
    flags += " --models.1.shift.mlp 0.5 --models.0.weight 0.25"
    job = load_merge_job(file, flags=flags.split())
    merger = job.merger()
    at = "model.layers.1.mlp.up_proj.weight"
    inputs = merger.method.inputs_at(merger.method.merger, merger.plan(), at)
    one, two = (found.options for found in inputs)
    assert dict(one) == {
        "importance": Path("x.safetensors"),
        "power": 3.0,
        "parts": ["layers.0", "norm"],
        "shift": {},
        "kind": "plain",
    }
    assert dict(two) == {
        "importance": Path(second["options"]["importance"]),
        "power": 2.0,
        "parts": ["norm", "mlp"],
        "shift": {"norm": 2.0, "mlp": 0.5},
        "kind": "plain",
    }
    assert [found.weight for found in inputs] == [0.25, 1.0]
    assert job.places["models.0.kind"] == "--models.0.kind" and job.places["models.1.shift"] == f"{file}:5"
    again = tmp_path / "again.yaml"
    again.write_text(job.to_yaml())
    assert load_merge_job(again).resolved() == job.resolved()


def test_the_recipe_beside_the_result_makes_it_again(models: list[dict[str, Any]], tmp_path: Path) -> None:
    models[0]["options"] |= {"shift": {"norm": 1.0}, "parts": ["layers", "norm"], "power": {"gradient": [1, 2]}}
    models[1]["options"]["importance"] = Path(models[1]["options"]["importance"])
    merge("importance", models, tmp_path / "first", shift={"mlp": 0.1}, importance=models[1]["options"]["importance"])
    written = yaml.safe_load((tmp_path / "first/merge.yaml").read_text())
    assert written["models"][0]["options"]["shift"] == {"norm": 1.0} and written["shift"] == {"mlp": 0.1}
    load_merge_job(tmp_path / "first/merge.yaml", {"output": str(tmp_path / "again")}).merger().merge()
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "first")


FAULTS = {
    "--models.1.power x": "--models.1.power: model b: `power`: must be a number; got 'x'",
    "--models.1.kind other": "--models.1.kind: model b: `kind`: must be 'plain' or 'none'; got 'other'",
    "--models.1.powr 1": "--models.1.powr: unknown key `powr` of a model; fix: did you mean `power`?",
    "--models.1.power": "--models.1.power: needs a value; fix: write `--models.1.power VALUE`",
    "--models.1.power 1 --models.1.power 2": "--models.1.power: given 2 times, but it takes one value; got `1` and `2`",
    "--models.2.power 1": "--models.2.power: there is no input model 2; got 2 models, counted from 0",
    "--models.1.model c": "--models.1.model: unknown key `model` of a model",
    "--models.one.power 1": "--models.one.power: `--models` can't be set as a whole",
    "--models.1.power [1,[2]]": "--models.1.power: `power.1`: must be a number; got [2]",
}


@pytest.mark.parametrize("flags", FAULTS)
def test_what_is_wrong_with_a_model_names_it_and_the_key(flags: str) -> None:
    registry.register("merger", "importance", Importance)
    with pytest.raises(ConfigError) as raised:
        load_merge_job("importance", {"models": ["a", "b"]}, flags=flags.split())
    assert FAULTS[flags] in str(raised.value)


def test_what_is_wrong_in_a_file_has_its_line(tmp_path: Path) -> None:
    registry.register("merger", "importance", Importance)
    file = tmp_path / "merge.yaml"
    for own, message in {
        "parts: 3": "5: model b: `parts`",
        "kind: x": "5: model b: `kind`: must be 'plain' or 'none'; got 'x'",
        "shift: {norm: x}": "5: model b: `shift.norm`: must be a number; got 'x'",
        "options: {kind: x}": "5: model b: `kind`: must be 'plain' or 'none'; got 'x'",
    }.items():
        file.write_text(f"method: importance\nmodels:\n  - a\n  - model: b\n    {own}\n")
        with pytest.raises(ConfigError) as raised:
            load_merge_job(file)
        assert f"merge.yaml:{message}" in str(raised.value)
    with pytest.raises(ConfigError, match=r"models\[1\]: model b: density ± epsilon / 2 must lie in \(0, 1\]"):
        ModelMerger(MergeConfig(method="della", models=["a", {"model": "b", "options": {"density": 0.05}}]))


def test_a_file_that_changed_keeps_a_merge_from_going_on(
    models: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_chunk = Importance.merge_chunk

    def stopped(self: Importance, chunk: Chunk, measured: Any) -> Tensor:
        if chunk.name == "model.norm.weight":
            raise KeyboardInterrupt
        return merge_chunk(self, chunk, measured)

    for changed in (False, True):
        monkeypatch.setattr(Importance, "merge_chunk", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge("importance", models, tmp_path / "out", threads=1)
        monkeypatch.setattr(Importance, "merge_chunk", merge_chunk)
        if changed:
            file = Path(models[2]["options"]["importance"])
            save_file({name: torch.ones(shape) for name, shape in SHAPES.items()}, file)
            with pytest.raises(ConfigError, match="the unfinished merge is of other inputs or options"):
                merge("importance", models, tmp_path / "out", threads=1, resume=True)
        else:
            merge("importance", models, tmp_path / "out", threads=1, resume=True)
            (tmp_path / "out").rename(tmp_path / "kept")


def test_an_option_file_isnt_written_over(models: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge("importance", models, out)
    models[0]["options"]["importance"] = str(out / "model.safetensors")
    with pytest.raises(ConfigError, match="one of the inputs is in the output directory"):
        merge("importance", models, out, overwrite=True)


def test_a_method_that_overrides_merge_sees_models_too(tmp_path: Path) -> None:
    base, paths = tiny_family(tmp_path, 2)
    seen = []

    class Chosen(Importance):
        """Takes the models that are tagged."""

        api = 1

        def merge(self, merge: ModelMerger) -> None:
            seen.extend(merge.inputs)
            at = merge.inputs_at("model.layers.1.mlp.up_proj.weight")
            assert [one.weight for one in at] == [one.weight for one in merge.inputs]
            assert set(merge.tensors) == set(read_weights(base))
            merge.write(self, [one.index for one in merge.inputs if "keep" in one.options["parts"]])

    registry.register("merger", "chosen", Chosen)
    entries = [{"model": str(path), "weight": 2.0, "options": {"parts": ["keep", "."]}} for path in paths]
    entries[0]["options"] = {"kind": "none"}
    result = merge("chosen", entries, tmp_path / "out")
    assert isinstance(result, MergeResult)
    assert [(one.name, one.path, one.index, one.options["kind"]) for one in seen] == [
        (str(paths[0]), paths[0], 0, "none"),
        (str(paths[1]), paths[1], 1, "plain"),
    ]
    merged, second = read_weights(tmp_path / "out"), read_weights(paths[1])
    assert all(torch.allclose(merged[name], second[name]) for name in second)
    entries[1]["weight"] = [0.0, 1.0]
    with pytest.raises(ConfigError, match=r"models\[1\]\.weight: `chosen` takes one value for a whole model"):
        merge("chosen", entries, tmp_path / "other")


def test_adapters_and_layers_put_together_say_where_they_lie(tmp_path: Path) -> None:
    base, paths = tiny_family(tmp_path, 1)
    registry.register("merger", "importance", Importance)
    SEEN.clear()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base)}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings))
    at = "base_model.model.model.layers.0.mlp.up_proj"
    rows, columns = read_weights(base)["model.layers.0.mlp.up_proj.weight"].shape
    factors = {f"{at}.lora_A.weight": torch.ones(1, columns), f"{at}.lora_B.weight": torch.ones(rows, 1)}
    save_file(factors, tmp_path / "lora/adapter_model.safetensors")
    runs = [{"model": str(base), "layers": [0, 1]}, {"model": str(paths[0]), "layers": [1, 2]}]
    named = [f"{paths[0]}+{tmp_path / 'lora'}", str(tmp_path / "lora"), {"model": runs}]
    merge("importance", named, tmp_path / "out", threads=1)
    for seen in SEEN.values():
        assert [path for _, path, *_ in seen] == [tmp_path / "lora", tmp_path / "lora", None]
        assert [name for name, *_ in seen][:2] == named[:2]


def test_plugins_that_say_what_cannot_be_are_broken() -> None:
    class Unknown(Importance):
        """Names an option that isn't."""

        api = 1
        per_model = ("mask",)

    registry.register("merger", "broken", Unknown)
    with pytest.raises(PluginError, match="`per_model` names `mask`"):
        ModelMerger(MergeConfig(method="broken", models=["a"]))


def test_one_tensor_in_memory() -> None:
    tensors = [torch.ones(3), torch.full((3,), 3.0)]
    merger = Importance(ImportanceConfig(shift={"mlp": 1.0}))
    assert merge_tensor(merger, tensors).tolist() == [3.0] * 3
    own = [{"shift": {}}, {}]
    assert merge_tensor(merger, tensors, [3.0, 1.0], options=own).tolist() == [7 / 4] * 3
    assert merge_tensor(merger, tensors[::-1], [1.0, 3.0], options=own[::-1], chunk=4).tolist() == [7 / 4] * 3
    with pytest.raises(ConfigError, match="`scale` of a model"):
        merge_tensor(merger, tensors, options=[{"scale": 1}, {}])
    with pytest.raises(ConfigError, match="`kind`: must be"):
        merge_tensor(merger, tensors, options=[{"kind": "x"}, {}])


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_method_raises_names_it_and_the_tensor(
    models: list[dict[str, Any]], tmp_path: Path, threads: int
) -> None:
    models[1]["options"] = {"importance": "gone.safetensors"}
    with pytest.raises(PluginError) as raised:
        merge("importance", models, tmp_path / "out", threads=threads)
    assert "merger Importance: merging tensor `model." in str(raised.value)
    assert "got FileNotFoundError: No such file or directory: gone.safetensors" in str(raised.value)


@pytest.mark.parametrize("changes", [{}, {"chunk_shape": "rows"}, {"chunk_shape": "tensor"}])
def test_what_a_method_brings_is_cut_as_chunks_are(changes: dict[str, str]) -> None:
    values = torch.arange(12.0 * 40).view(12, 40)
    model = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    cls = type("Product", (Product,), changes)
    for chunk in (4, 100, 1000):
        assert merge_tensor(cls(), [model], chunk=chunk, name="values").equal(model * values)
    large = torch.randn(200, 300)
    stream = TensorStream("w", None, [MemoryTensor(large)])
    for sampled in stream.sample(9):
        assert sampled.cut(large).equal(sampled.tensors[0])
    with pytest.raises(ModelError, match=r"belongs to tensor `values` has another size; got \[12, 40\] for \[12, 4\]"):
        merge_tensor(cls(), [torch.ones(12, 4)], name="values")


class Product(Merger):
    """Multiplies a model by values that it brings itself."""

    api = 1

    def measure(self, stream: TensorStream) -> Tensor:
        return torch.arange(12.0 * 40).view(12, 40)

    def merge_chunk(self, chunk: Chunk, measured: Tensor) -> Tensor:
        return chunk.tensors[0] * chunk.cut(measured)


class CappedConfig(BaseConfig):
    """Options of capped sums."""

    cap: float | None = Field(None, gt=0, description="Largest value of a model; null sets none.")


class Capped(Merger):
    """Mean of models, each cut off at a value."""

    api = 1
    Config = CappedConfig
    per_model = ("cap",)

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        caps = zip(chunk.tensors, chunk.stream.option("cap"), strict=True)
        return torch.stack([tensor if cap is None else tensor.clamp(-cap, cap) for tensor, cap in caps]).mean(0)


def test_a_number_or_null_varies_by_layer_too(tmp_path: Path) -> None:
    _, paths = tiny_family(tmp_path, 2)
    registry.register("merger", "capped", Capped)
    own = [{"model": str(path)} for path in paths]
    own[1]["options"] = {"cap": [0.01, 0.03]}  # type: ignore[assignment]
    merge("capped", own, tmp_path / "out")
    one, two, merged = (read_weights(path) for path in (*paths, tmp_path / "out"))
    for layer, cap in ((0, 0.01), (1, 0.03)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(merged[name], (one[name] + two[name].clamp(-cap, cap)) / 2, rtol=0, atol=1e-7)
    own[1]["options"] = {"cap": [0.01, -1.0]}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"models\[1\]\.cap: model .*model-1: `cap`: must be greater than 0; got -1"):
        merge("capped", own, tmp_path / "other")
