"""A merge makes of an adapter the model that PEFT computes with it, not folded: tied heads, experts, new tokens and all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from merge_helpers import merge, read_weights
from torch import Tensor

from rlhf_core.infra.errors import ModelError
from rlhf_core.testing.tiny import save_tiny, tiny_tokenizer

SMALL: dict[str, Any] = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1}
TOKENS = torch.randint(7, 263, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Path]:
    """A tiny model by whether its head is its embeddings."""
    root = tmp_path_factory.mktemp("bases")
    return {tied: save_tiny(root / f"{tied}", 0, tie_embeddings=tied, **SMALL) for tied in (True, False)}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapt(base: Path, path: Path, *, grown: int = 0, seed: int = 1, **settings: Any) -> Tensor:
    """Write an adapter whose every trained value is random; return the logits of the model that it was trained on."""
    model = load(base)
    if grown:
        model.resize_token_embeddings(model.config.vocab_size + grown)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **settings}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(path)
    return logits(adapted)


def assert_same(merged: Path, expected: Tensor, *, tokens: int | None = None) -> None:
    """Compare logits, of the first so many tokens where given."""
    torch.testing.assert_close(logits(load(merged))[..., :tokens], expected[..., :tokens], rtol=1e-5, atol=1e-5)


SETTINGS: dict[str, dict[str, Any]] = {
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "embeddings whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "whole, kept tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [30, 9]},
    "tokens of both": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 30], "lm_head": [40]}},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [40]}},
}  # fmt: skip
ONE_TENSOR = {"kept tied", "whole, kept tied", "some tokens", "plain"}
"""Those that leave a tied head tied."""
ONE_SIDE = {"embeddings", "head", "kept tied"}
"""Those with which PEFT doesn't save the rows of new tokens on the other side."""


@pytest.mark.parametrize("grown", [0, 2], ids=["", "with new tokens"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_of_embeddings_and_heads(
    name: str, tied: bool, grown: int, bases: Mapping[bool, Path], tmp_path: Path
) -> None:
    expected = adapt(bases[tied], tmp_path / "adapter", grown=grown, **SETTINGS[name])
    if grown and not tied and name in ONE_SIDE:
        with pytest.raises(ModelError, match=r"rows of new tokens in `.*`, and none in `.*265 rows, and 263"):
            merge("linear", [tmp_path / "adapter"], tmp_path / "out")
        return
    merge("linear", [tmp_path / "adapter"], tmp_path / "out")
    assert_same(tmp_path / "out", expected)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and name in ONE_TENSOR)
    assert ("lm_head.weight" in read_weights(tmp_path / "out")) is not config["tie_word_embeddings"]
    assert config["vocab_size"] == 263 + grown


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_vocabulary_that_grew_beside_an_adapter(tied: bool, bases: Mapping[bool, Path], tmp_path: Path) -> None:
    expected = adapt(bases[tied], tmp_path / "adapter", grown=2, target_modules=["q_proj"])
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<foo>", "<bar>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge("linear", [tmp_path / "adapter"], tmp_path / "out")
    assert_same(tmp_path / "out", expected)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 265
    # With its base, whose vocabulary is another one, rows are lined up as those of whole models are.
    with pytest.raises(ModelError, match=r"vocabulary differs.*265 in 265|263 tokens in 263 rows, and 265 in 265"):
        merge("task_arithmetic", [tmp_path / "adapter"], tmp_path / "based", base=bases[tied])
    merge("task_arithmetic", [tmp_path / "adapter"], tmp_path / "based", base=bases[tied], tokenizer="union")
    assert_same(tmp_path / "based", expected, tokens=263)


def test_rows_of_new_tokens_that_were_not_saved_are_named(bases: Mapping[bool, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapt(bases[False], tmp_path / "adapter", grown=2, target_modules=["embed_tokens"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "base_layer" not in key}, file)
    with pytest.raises(
        ModelError, match=r"other tokens than its base has.*265 rows, the base 263.*save_embedding_layers"
    ):
        merge("linear", [tmp_path / "adapter"], tmp_path / "out")


PLAIN: dict[str, dict[str, Any]] = {
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases beside": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "^model.layers.0.mlp.up_proj": 3},
        "alpha_pattern": {"up_proj": 3, r".*\.o_proj": 5},
    },
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    "by a regular expression": {"target_modules": r".*\.(q|up)_proj"},
}


@pytest.mark.parametrize("name", PLAIN)
def test_kinds_of_adapters(name: str, tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    expected = adapt(tmp_path / "base", tmp_path / "adapter", **PLAIN[name])
    merge("linear", [tmp_path / "adapter"], tmp_path / "out")
    assert_same(tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, "DoRA of `model.embed_tokens.weight`"),
        (
            {"target_modules": ["q_proj"], "lora_bias": True},
            "LoRA with biases; fix: where the base's layers have biases",
        ),
        ({"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]}, "activated LoRA$"),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 1], [0, 1]]}, "layers that the adapter replicates"),
    ],
)
def test_what_is_not_folded_is_named(
    settings: dict[str, Any], message: str, bases: Mapping[bool, Path], tmp_path: Path
) -> None:
    adapt(bases[False], tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=message):
        merge("linear", [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize(
    "targets", [["c_attn", "c_proj", "c_fc"], ["c_attn", "lm_head"], ["h.0.attn.c_proj", "lm_head"], ["wte", "c_fc"]]
)
def test_layers_that_are_stored_turned(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=272, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    expected = adapt(tmp_path / "base", tmp_path / "adapter", target_modules=targets)
    merge("linear", [tmp_path / "adapter"], tmp_path / "out")
    assert_same(tmp_path / "out", expected)


def _moe(kind: str, **more: Any) -> Callable[[], Any]:
    common: dict[str, Any] = {
        "vocab_size": 272, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip

    def make() -> Any:
        config = getattr(transformers, f"{kind}Config")(**{**common, **more})
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return make


EXPERTS: dict[str, Callable[[], Any]] = {
    # A tensor for each expert in the files, under other names.
    "Mixtral": _moe("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    # The gate, up and down projections of one shape.
    "Qwen3Moe": _moe("Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    # Two experts of four rows: experts and halves differ by place.
    "Olmoe": _moe("Olmoe", num_experts=2, num_experts_per_tok=1, intermediate_size=16),
    # All experts of a layer in one tensor of the files, inputs before outputs.
    "GptOss": _moe("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2),
    # All in one tensor, outputs first, under other names.
    "GraniteMoe": _moe("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_adapters_of_experts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EXPERTS[name]()
    with torch.no_grad():  # biases of zero and routers near it would hide a good deal
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "base")
    experts = sorted({key.rpartition(".")[2] for key, parameter in model.named_parameters() if parameter.ndim == 3})
    settings = {"target_modules": ["q_proj", "o_proj"], "target_parameters": experts, "alpha_pattern": {experts[0]: 3}}
    expected = adapt(tmp_path / "base", tmp_path / "adapter", **settings)
    merge("linear", [tmp_path / "adapter"], tmp_path / "out")
    assert_same(tmp_path / "out", expected)
    assert read_weights(tmp_path / "out").keys() == read_weights(tmp_path / "base").keys()


def test_an_adapter_of_one_parameter_and_a_router(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EXPERTS["Mixtral"]()
    model.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "gate.weight"]}
    expected = adapt(tmp_path / "base", tmp_path / "adapter", **settings)
    merge("linear", [tmp_path / "adapter"], tmp_path / "out")
    assert_same(tmp_path / "out", expected)


def test_an_adapter_of_experts_on_another_model_is_named(bases: Mapping[bool, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    EXPERTS["Olmoe"]().save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"], target_parameters=["gate_up_proj"])
    with pytest.raises(ModelError, match=r"PEFT can't put the adapter on a model like its base|doesn't fit its base"):
        merge("linear", [f"{bases[False]}+{tmp_path / 'adapter'}"], tmp_path / "out")


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["q_proj", "lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_on_an_adapter(tied: bool, targets: list[str], bases: Mapping[bool, Path], tmp_path: Path) -> None:
    adapt(bases[tied], tmp_path / "first", target_modules=["q_proj"], modules_to_save=["norm"])
    merge("linear", [tmp_path / "first"], tmp_path / "folded")
    expected = adapt(tmp_path / "folded", tmp_path / "second", seed=2, target_modules=targets)
    settings = json.loads((tmp_path / "second/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../first"
    (tmp_path / "second/adapter_config.json").write_text(json.dumps(settings))
    for number, name in enumerate([tmp_path / "second", f"{bases[tied]}+{tmp_path / 'first'}+{tmp_path / 'second'}"]):
        merge("linear", [name], tmp_path / f"out-{number}")
        assert_same(tmp_path / f"out-{number}", expected)
    merge("task_arithmetic", [tmp_path / "second"], tmp_path / "based", base=bases[tied])
    assert_same(tmp_path / "based", expected)


# Heads that only some inputs have


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
@pytest.mark.parametrize("first", [True, False], ids=["tied first", "untied first"])
def test_tied_and_untied_models(
    method: str, first: bool, bases: Mapping[bool, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every method gives what it gives for models that store what each uses."""
    other = save_tiny(tmp_path / "other", 3, tie_embeddings=True, **SMALL)
    names = [bases[first], bases[not first], other]
    stored = []
    for number, name in enumerate(names):
        model = load(name)
        weights = {**model.state_dict()}
        model.config.tie_word_embeddings = False
        untied = transformers.LlamaForCausalLM(model.config)
        untied.load_state_dict(weights)
        untied.save_pretrained(tmp_path / f"stored-{number}")
        shutil.copy(name / "tokenizer.json", tmp_path / f"stored-{number}")
        stored.append(tmp_path / f"stored-{number}")
    based = method not in ("linear", "slerp")

    def merged(inputs: list[Path], output: Path) -> dict[str, Tensor]:
        models = inputs[1:] if based else inputs[: 2 if method == "slerp" else 3]
        merge(method, models, output, base=inputs[0] if based else None)
        return read_weights(output)

    with caplog.at_level(logging.WARNING):
        found, expected = merged(names, tmp_path / "out"), merged(stored, tmp_path / "expected")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert caplog.text.count("the output head of") == 1
    assert_same(tmp_path / "out", logits(load(tmp_path / "expected")))


def test_a_head_that_is_lacking_is_named(bases: Mapping[bool, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = shutil.copytree(bases[False], tmp_path / "broken")
    weights = read_weights(broken)
    del weights["lm_head.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"`lm_head.weight` is in .* and not in .*head's weights"):
        merge("linear", [bases[False], broken], tmp_path / "out")


def test_an_adapter_that_unties_is_merged_with_tied_models(bases: Mapping[bool, Path], tmp_path: Path) -> None:
    expected = adapt(bases[True], tmp_path / "adapter", target_modules=["lm_head"])
    merge("task_arithmetic", [tmp_path / "adapter"], tmp_path / "out", base=bases[True])
    assert_same(tmp_path / "out", expected)


def test_buffers_that_some_inputs_hold_are_left_out(
    bases: Mapping[bool, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    old = shutil.copytree(bases[True], tmp_path / "old")
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.cos_cached": torch.ones(4, 8),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        "model.embeddings.position_ids": torch.arange(4),
    }
    save_file({**read_weights(old), **buffers}, old / "model.safetensors", metadata={"format": "pt"})
    for name, models in (("last", [bases[True], old]), ("first", [old, bases[True]])):
        caplog.clear()
        merge("linear", models, tmp_path / name)
        assert read_weights(tmp_path / name).keys() == read_weights(bases[True]).keys()
        assert "5 tensors are left out" in caplog.text
    weights = {**read_weights(bases[True]), "model.layers.0.attn.bias": torch.ones(4)}
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"`model.layers.0.attn.bias` is in"):  # a bias of its own is no mask
        merge("linear", [bases[True], old], tmp_path / "none")
