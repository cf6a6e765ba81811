"""Models put together of others' layers, and values by slice: which layer lies where, with what configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from merge_helpers import merge, read_weights, write_weights
from torch import Tensor

from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.merging.job import load_merge_job
from rlhf_core.merging.tensor_names import layer_of
from rlhf_core.testing.tiny import save_tiny

TINY: dict[str, Any] = {"layers": 3, "hidden": 16, "heads": 2, "kv_heads": 1}


def numbered(path: Path, first: float, *, tied: bool = False) -> Path:
    """Write a model whose layers are `first`, `first` + 1 …, its embeddings `first` - 1, all after the layers `first` - 2."""
    save_tiny(path, 0, tie_embeddings=tied, **TINY)

    def value(name: str) -> float:
        layer = layer_of(name)
        return first + layer if layer is not None else first - (1 if "embed" in name else 2)

    return write_weights(path, {name: torch.full_like(w, value(name)) for name, w in read_weights(path).items()})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a (10 …), b (20 …), the same tied (at, bt), and zero and one throughout."""
    root = tmp_path_factory.mktemp("numbered")
    for name, first, tied in (("a", 10, False), ("b", 20, False), ("at", 10, True), ("bt", 20, True)):
        numbered(root / name, first, tied=tied)
    for name, number in (("zero", 0.0), ("one", 1.0)):
        save_tiny(root / name, 0, tie_embeddings=False, **TINY)
        weights = {key: torch.full_like(w, number) for key, w in read_weights(root / name).items()}
        write_weights(root / name, weights)
    return root


def values(path: Path) -> dict[str, list[float]]:
    """Return what a merged model's parts hold: layers by their q and o projection, embeddings, norm, head."""
    weights = read_weights(path)

    def one(name: str) -> list[float]:
        tensor: Tensor = weights[name]
        assert bool((tensor == tensor.flatten()[0]).all())
        return [round(float(tensor.flatten()[0]), 5)]

    depth = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    assert depth == 1 + max(layer_of(name) or 0 for name in weights)
    found = {
        kind: [one(f"model.layers.{layer}.self_attn.{kind}_proj.weight")[0] for layer in range(depth)] for kind in "qo"
    }
    found |= {"embeddings": one("model.embed_tokens.weight"), "norm": one("model.norm.weight")}
    return found | ({"head": one("lm_head.weight")} if "lm_head.weight" in weights else {})


def slices(*given: Any, method: str = "passthrough", **more: Any) -> dict[str, Any]:
    """Return a file of mergekit's; a source is (model, first, last + 1[, parameters])."""
    described = []
    for one in given:
        sources, own = one if isinstance(one, tuple) and isinstance(one[0], list) else ([one], {})
        listed = [
            {"model": s[0], "layer_range": [s[1], s[2]], **({"parameters": s[3]} if len(s) > 3 else {})}
            for s in sources
        ]
        described.append({"sources": listed, **own})
    return {"merge_method": method, "slices": described, **more}


@pytest.fixture
def run(models: Path, tmp_path: Path):
    """Merge what a file of mergekit's says, models by their names alone; return what its parts hold."""

    def go(given: dict[str, Any], name: str = "out") -> dict[str, list[float]]:
        text = yaml.safe_dump(given)
        for model in ("at", "bt", "a", "b", "zero", "one"):
            text = text.replace(f"model: {model}\n", f"model: {models / model}\n")
        file = tmp_path / "theirs.yaml"
        file.write_text(text)
        load_merge_job(file, flags=["--output", str(tmp_path / name)]).merger().merge()
        return values(tmp_path / name)

    return go


HALF = {"weight": 0.5}
FILES: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {
    "two runs": (
        slices(("a", 0, 2), ("b", 1, 3)),
        {"q": [10, 11, 21, 22], "o": [10, 11, 21, 22], "embeddings": [9], "norm": [18], "head": [18]},
    ),
    "a part silenced": (
        slices(("a", 0, 2), ("b", 1, 3, {"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 0.5}]})),
        {"q": [10, 11, 10.5, 11], "o": [10, 11, 0, 0], "embeddings": [9], "norm": [9], "head": [9]},
    ),
    "a gradient begins in each slice": (
        slices(("a", 0, 2), ("b", 0, 3), parameters={"scale": [0.5, 1]}),
        {"q": [5, 11, 10, 15.75, 22], "o": [5, 11, 10, 15.75, 22], "embeddings": [4.5], "norm": [9], "head": [9]},
    ),
    "layers of other numbers with each other": (
        slices(([("a", 0, 2), ("b", 1, 3)], {}), method="linear", parameters={"weight": 1}),
        {"q": [15.5, 16.5], "o": [15.5, 16.5], "embeddings": [14], "norm": [13], "head": [13]},
    ),
    "weights by slice": (
        slices(
            ([("zero", 0, 1, {"weight": 1}), ("one", 0, 1, {"weight": 0.25})], {}),
            ([("zero", 1, 3, {"weight": 1}), ("one", 1, 3, {"weight": 0.5})], {}),
            method="linear", parameters={"normalize": False},
        ),
        {"q": [0.25, 0.5, 0.5], "o": [0.25, 0.5, 0.5], "embeddings": [0.25], "norm": [0.5], "head": [0.5]},
    ),
    "gradients by slice": (
        slices(
            ([("zero", 0, 1, {"weight": 1}), ("one", 0, 1, {"weight": [0.1, 0.9]})], {}),
            ([("zero", 1, 3, {"weight": 1}), ("one", 1, 3, {"weight": [0.2, 0.6]})], {}),
            method="linear", parameters={"normalize": False},
        ),
        {"q": [0.9, 0.2, 0.6], "o": [0.9, 0.2, 0.6], "embeddings": [0.1], "norm": [0.2], "head": [0.2]},
    ),
    "a source's parameters, then its slice's, then all": (
        slices(
            (
                [("zero", 0, 3), ("one", 0, 3, {"weight": [{"filter": "q_proj", "value": 0.9}]})],
                {"parameters": {"weight": [{"filter": "o_proj", "value": [0.3, 0.6]}]}},
            ),
            method="linear", parameters={"normalize": False, "weight": 0.1},
        ),
        {"q": [0.9, 0.9, 0.9], "o": [0.3, 0.45, 0.6], "embeddings": [0.1], "norm": [0.1], "head": [0.1]},
    ),
    "differences": (
        slices(
            ([("zero", 0, 2), ("b", 0, 2)], {}), ([("zero", 0, 1), ("b", 2, 3)], {}),
            method="task_arithmetic", base_model="zero", parameters=HALF,
        ),
        {"q": [10, 10.5, 11], "o": [10, 10.5, 11], "embeddings": [9.5], "norm": [9], "head": [9]},
    ),
    "a base for each slice": (
        slices(
            ([("zero", 0, 2), ("b", 0, 2)], {"base_model": "zero"}), ([("one", 2, 3), ("b", 2, 3)], {"base_model": "one"}),
            method="task_arithmetic", parameters=HALF,
        ),
        {"q": [10, 10.5, 11.5], "o": [10, 10.5, 11.5], "embeddings": [9.5], "norm": [9.5], "head": [9.5]},
    ),
    "an arc with its ends in either order": (
        slices(
            ([("a", 0, 2), ("b", 0, 2)], {"parameters": {"t": 0}}), ([("b", 2, 3), ("a", 2, 3)], {"parameters": {"t": 1}}),
            method="slerp", base_model="a",
        ),
        {"q": [10, 11, 22], "o": [10, 11, 22], "embeddings": [9], "norm": [18], "head": [18]},
    ),
    "one model as it is": (
        {"merge_method": "passthrough", "models": [{"model": "a", "parameters": {"scale": 2}}]},
        {"q": [20, 22, 24], "o": [20, 22, 24], "embeddings": [18], "norm": [16], "head": [16]},
    ),
    "a module": (
        {
            "merge_method": "linear", "parameters": {"weight": 1},
            "modules": {"default": {"models": [{"model": "a"}, {"model": "b"}]}},
        },
        {"q": [15, 16, 17], "o": [15, 16, 17], "embeddings": [14], "norm": [13], "head": [13]},
    ),
    "both heads tied": (
        slices(("at", 0, 2), ("bt", 1, 3)),
        {"q": [10, 11, 21, 22], "o": [10, 11, 21, 22], "embeddings": [9], "norm": [18]},
    ),
    "the first head tied": (
        slices(("at", 0, 2), ("b", 1, 3)),
        {"q": [10, 11, 21, 22], "o": [10, 11, 21, 22], "embeddings": [9], "norm": [18], "head": [18]},
    ),
    "heads merged of tied and untied": (
        {"merge_method": "linear", "models": [{"model": "at"}, {"model": "b"}], "parameters": {"weight": 1}},
        {"q": [15, 16, 17], "o": [15, 16, 17], "embeddings": [14], "norm": [13], "head": [13.5]},
    ),
}  # fmt: skip
"""With what mergekit 0.1.5 gives for each."""
OURS: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {
    # mergekit writes no head here, though its configuration says that there is one.
    "the last head tied": (
        slices(("a", 0, 2), ("bt", 1, 3)),
        {"q": [10, 11, 21, 22], "o": [10, 11, 21, 22], "embeddings": [9], "norm": [18], "head": [19]},
    ),
    # mergekit takes norm and head of as many sources as the first slice has.
    "more sources in the last slice": (
        slices(("a", 0, 2), ([("a", 2, 3), ("b", 2, 3)], {}), method="linear", parameters={"weight": 1}),
        {"q": [10, 11, 17], "o": [10, 11, 17], "embeddings": [9], "norm": [13], "head": [13]},
    ),
    "more sources in the first slice": (
        slices(([("a", 0, 2), ("b", 0, 2)], {}), ("b", 2, 3), method="linear", parameters={"weight": 1}),
        {"q": [15, 16, 22], "o": [15, 16, 22], "embeddings": [14], "norm": [18], "head": [18]},
    ),
    "weights divided by their sum": (
        {
            "merge_method": "task_arithmetic", "base_model": "zero", "parameters": {"normalize": True},
            "models": [{"model": "a", "parameters": {"weight": 3}}, {"model": "b", "parameters": {"weight": 1}}],
        },
        {"q": [12.5, 13.5, 14.5], "o": [12.5, 13.5, 14.5], "embeddings": [11.5], "norm": [10.5], "head": [10.5]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, *OURS])
def test_slices_of_a_file(name: str, run, tmp_path: Path) -> None:
    given, expected = {**FILES, **OURS}[name]
    assert run(given) == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        round(float(model.get_output_embeddings().weight[0, 0]), 5) == expected.get("head", expected["embeddings"])[0]
    )
    # What is written down makes the same again.
    load_merge_job(tmp_path / "out/merge.yaml", flags=["--output", str(tmp_path / "again")]).merger().merge()
    assert values(tmp_path / "again") == expected


FAULTS = {
    "the base model must be one of the slice's sources": slices(
        ([("a", 0, 3), ("b", 0, 3)], {}), method="task_arithmetic", base_model="zero", parameters=HALF
    ),
    "the slice has no base model, though others have one": slices(
        ([("a", 0, 2), ("zero", 0, 2)], {"base_model": "zero"}), ("a", 2, 3), method="task_arithmetic", parameters=HALF
    ),
    "must have the same number of layers; got [[0, 2], [0, 3]]": slices(([("a", 0, 2), ("b", 0, 3)], {}), method="linear"),
    "has no layer 3; got layers 0 to 5 of 3": slices(("a", 0, 5)),
    "`slices.0.sources.0.layer_range`: empty layer range: write [first, last + 1]": slices(("a", 1, 1)),
    "passthrough merges 1 models; got 2": slices(([("a", 0, 2), ("b", 0, 2)], {})),
    "unknown option `slices.0.sorces`; fix: did you mean `sources`?": {
        "merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "sorces": 1}],
    },
    "unknown option `slices.0.sources.0.layer_rang`; fix: did you mean `layer_range`?": {
        "merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_rang": [0, 1]}]}],
    },
    "only a file of one module": {"merge_method": "linear", "modules": {"x": {}, "y": {}}},
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_slices_that_have_no_meaning(message: str, run) -> None:
    with pytest.raises((ConfigError, ModelError)) as raised:
        run(FAULTS[message])
    assert message in raised.value.line()


def test_a_stack_in_a_file_of_ours(models: Path, tmp_path: Path) -> None:
    text = f"""
method: passthrough
models:
  - model: [{{model: {models}/a, layers: [0, 2]}}, {{model: {models}/b, layers: [1, 3]}}]
    weight: {{filters: {{o_proj: {{runs: [{{count: 2, value: 1}}, {{count: 2, value: 0}}]}}}}, default: 1}}
"""
    (tmp_path / "ours.yaml").write_text(text)
    load_merge_job(tmp_path / "ours.yaml", flags=["--output", str(tmp_path / "out")]).merger().merge()
    assert values(tmp_path / "out")["o"] == [10, 11, 0, 0] and values(tmp_path / "out")["q"] == [10, 11, 21, 22]


def test_a_stack_of_one_model_twice_computes_its_layers_twice(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", 0, **TINY)
    runs = [{"model": str(base), "layers": span} for span in ([0, 2], [1, 3])]
    merge("passthrough", [{"model": runs}], tmp_path / "out")
    stacked, plain = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", base))
    layers = plain.model.layers
    plain.model.layers = torch.nn.ModuleList([layers[number] for number in (0, 1, 1, 2)])
    plain.config.num_hidden_layers = 4
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            stacked(ids, use_cache=False).logits, plain(ids, use_cache=False).logits, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("said", [True, False], ids=["kinds listed", "kinds by rule"])
def test_kinds_of_layers_go_with_them(said: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=272, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "base")
    kinds = config.layer_types
    file = tmp_path / "base/config.json"
    written = json.loads(file.read_text())
    if not said:
        del written["layer_types"]
        file.write_text(json.dumps(written))
    runs = [{"model": str(tmp_path / "base"), "layers": span} for span in ([0, 3], [2, 4])]
    merge("passthrough", [{"model": runs}], tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert found.layer_types == [kinds[number] for number in (0, 1, 2, 2, 3)] and found.num_hidden_layers == 5


def test_layers_with_and_without_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 272, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
    }  # fmt: skip
    for name, more in (("listed", {"mlp_only_layers": [1]}), ("by-rule", {"decoder_sparse_step": 2})):
        transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**common, **more)).save_pretrained(tmp_path / name)

    def stack(name: str, *spans: list[int]) -> list[Any]:
        return [{"model": [{"model": str(tmp_path / name), "layers": span} for span in spans]}]

    merge("passthrough", stack("listed", [0, 2], [1, 4]), tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.config.mlp_only_layers == [1, 2] and not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(ModelError, match="layer 2 would have other tensors"):
        merge("passthrough", stack("by-rule", [0, 2], [1, 4]), tmp_path / "odd")
    merge("passthrough", stack("by-rule", [0, 2], [0, 4]), tmp_path / "even")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "even", output_loading_info=True)
    assert len(model.model.layers) == 6 and not info["missing_keys"] and not info["unexpected_keys"]


def test_ends_with_other_vocabularies_are_refused(models: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", 0, vocab_size=270, tie_embeddings=False, **TINY)
    runs = [{"model": str(models / "a"), "layers": [0, 2]}, {"model": str(other), "layers": [1, 3]}]
    with pytest.raises(ModelError, match=r"its vocabulary differs from that of .*got 270 rows, and 263"):
        merge("passthrough", [{"model": runs}], tmp_path / "out")


def test_a_model_of_several_stacks_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"model.{part}.layers.{n}.x.weight": torch.ones(2, 2) for part in ("text", "vision") for n in (0, 1)}
    path = write_weights(tmp_path / "two", weights)
    with pytest.raises(ModelError, match=r"several stacks of layers.*model.text.layers., model.vision.layers."):
        merge("passthrough", [{"model": [{"model": str(path), "layers": [0, 1]}]}], tmp_path / "out")
