"""Adapters go where peft puts them: names, ends of names, regular expressions, embeddings, expert projections, whole modules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlhf_core.config.training import LoraConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel
from rlhf_core.models.lora import apply_lora
from rlhf_core.testing.tiny import VOCAB_SIZE, save_tiny, tiny_tokenizer

IDS = torch.randint(7, 263, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    few = {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    qwen = Qwen3MoeConfig(**shape, **small, **experts, num_key_value_heads=1, max_position_embeddings=64)
    mixtral = MixtralForCausalLM(MixtralConfig(**shape, **small, **few))
    made = {"gpt2": gpt2, "mixtral": mixtral, "qwen3_moe": Qwen3MoeForCausalLM(qwen)}
    for name, model in made.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    save_tiny(root / "llama", layers=2, hidden=16)
    return {name: root / name for name in ("llama", *made)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


EXPERTS = {"mlp.experts.gate_up_proj"}
TARGETS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "a Conv1D": ("gpt2", {"target_modules": ["c_attn"]}, {"c_attn"}),
    "the end of a name": ("llama", {"target_modules": ["self_attn.q_proj"]}, {"q_proj"}),
    "one name as text": ("llama", {"target_modules": "v_proj"}, {"v_proj"}),
    "a regular expression": ("llama", {"target_modules": r".*layers\.1\..*(q|k)_proj"}, {"q_proj", "k_proj"}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens"]}, {"embed_tokens"}),
    "all but some": (
        "llama",
        {"exclude_modules": ["mlp.down_proj", "lm_head"]},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"},
    ),
    "an expert projection": ("mixtral", {"target_modules": ["gate_up_proj"]}, EXPERTS),
    "a module and a projection": ("mixtral", {"target_modules": ["q_proj", "gate_up_proj"]}, {"q_proj", *EXPERTS}),
    "parameters": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        {"q_proj", *EXPERTS},
    ),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"q_proj"}),
    "rank-stabilised": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}, {"q_proj"}),
    "DoRA": ("llama", {"target_modules": ["q_proj"], "use_dora": True}, {"q_proj"}),
    "names between commas in one entry": ("llama", {"target_modules": ["q_proj,v_proj"]}, {"q_proj", "v_proj"}),
    "names between commas": ("llama", {"target_modules": "q_proj, v_proj"}, {"q_proj", "v_proj"}),
    "experts by the names they had": (
        "mixtral",
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
        {"q_proj", *EXPERTS, "mlp.experts.down_proj"},
    ),
    "experts by their layers' names": (
        "qwen3_moe",
        {"target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"},
        {"q_proj", "k_proj", "v_proj", "o_proj", *EXPERTS, "mlp.experts.down_proj"},
    ),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, {"q_proj"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, {"q_proj"}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_pefts_and_what_is_saved_loads_there_and_here(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model, options, ends = TARGETS[name]
    before = logits(AutoModelForCausalLM.from_pretrained(models[model], dtype=torch.float32))
    policy = PolicyModel.from_pretrained(models[model], lora=LoraConfig(rank=4, **options))
    inside: Any = policy.model.base_model
    parameters = {".".join(n.split(".")[-3:]) for n in inside.targeted_parameter_names}
    assert {n.split(".")[-1] for n in inside.targeted_module_names} | parameters == ends
    assert far(logits(policy.model), before) < 1e-5, "a fresh adapter changes nothing"
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = logits(policy.model)
    assert far(expected, before) > 1e-3
    policy.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(models[model], dtype=torch.float32)
    assert far(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected) < 1e-5
    assert far(logits(PolicyModel.from_pretrained(tmp_path / "adapter").network), expected) < 1e-5
    assert far(logits(PolicyModel.from_pretrained(tmp_path / "adapter", adapter="fold").network), expected) < 1e-5


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "every layer": (
        {"target_modules": ["all_linear"]},
        r"lora.target_modules: the model has no module `all_linear`; fix: write `all-linear` for every linear layer",
    ),
    "none": (
        {"target_modules": []},
        r"lora.target_modules: names no module; fix: name modules",
    ),
    "a slip": (
        {"target_modules": ["q_prj"]},
        r"lora.target_modules: the model has no module `q_prj`; fix: did you mean `q_proj`",
    ),
    "one of two": (
        {"target_modules": ["q_proj", "k_prj"]},
        r"lora.target_modules: .*`k_prj`; fix: did you mean `k_proj`",
    ),
    "an end": (
        {"target_modules": ["self_atn.q_proj"]},
        r"no module `self_atn.q_proj`; fix: did you mean `self_attn.q_proj`",
    ),
    "an expression": (
        {"target_modules": ".*nothing"},
        r"lora: peft can.t add .*got .*\.\*nothing.*fix: name modules",
    ),
    "no such kind": (
        {"target_modules": ["input_layernorm"]},
        r"lora: peft can't add .*LlamaRMSNorm.* is not supported",
    ),
    "no expression": (
        {"target_modules": "*_proj"},
        r"lora.target_modules: `\*_proj` is neither names nor a regular expression; got nothing to repeat",
    ),
    "no expression to exclude": (
        {"exclude_modules": ".*(q_proj"},
        r"lora.exclude_modules: `.*` is neither names nor a regular expression; got missing \)",
    ),
    "whole modules": (
        {"modules_to_save": ["lm_hed"]},
        r"lora.modules_to_save: .*`lm_hed`; fix: did you mean `lm_head`",
    ),
    "parameters": (
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        r"lora.target_parameters: .*no parameter `mlp.experts.gate_up_proj`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_peft_refuses_is_told_with_the_nearest_name(models: dict[str, Path], name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        PolicyModel.from_pretrained(models["llama"], lora=LoraConfig(**options))
    assert "\n" not in caught.value.line()


def test_experts_are_pointed_to_as_parameters(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        PolicyModel.from_pretrained(models["mixtral"], lora=LoraConfig(target_modules=".*experts.*"))
    line = caught.value.line()
    assert "got a module MixtralExperts, which is not supported" in line
    assert "(embed_tokens, gate, k_proj, lm_head, o_proj, q_proj, v_proj)" in line, (
        "what has a matrix, and nothing else"
    )
    assert "lora.target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj]" in line
    with pytest.raises(ConfigError, match=r"no module `w4`.*target_parameters: \[mlp.experts.down_proj"):
        PolicyModel.from_pretrained(models["mixtral"], lora=LoraConfig(target_modules=["q_proj", "w4"]))
    with pytest.raises(
        ConfigError, match=r"name modules of the model \(embed_tokens, gate, k_proj, lm_head, o_proj, q_proj,"
    ):
        PolicyModel.from_pretrained(
            models["mixtral"], lora=LoraConfig(target_modules=["q_proj", "post_attention_layernorm"])
        )
    with pytest.raises(ConfigError, match=r"w1 without also targeting w3"):
        PolicyModel.from_pretrained(models["mixtral"], lora=LoraConfig(target_modules=["q_proj", "w1"]))


@pytest.mark.parametrize(
    ("options", "fix"), [({"dropout": 0.1}, "lora.dropout: 0"), ({"use_dora": True}, "lora.use_dora: false")]
)
def test_what_peft_doesnt_do_for_experts_is_told(models: dict[str, Path], options: Any, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"to parameters, which the experts of this model are.*fix: set `{fix}`"):
        PolicyModel.from_pretrained(models["mixtral"], lora=LoraConfig(**options))
    options |= {"target_modules": ["q_proj", "k_proj"]}
    assert PolicyModel.from_pretrained(models["mixtral"], lora=LoraConfig(**options)).has_adapter


def test_what_adapters_are_on_is_said(models: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    PolicyModel.from_pretrained(models["mixtral"], lora=LoraConfig(target_modules=["q_proj", "w1", "w3"]))
    assert "LoRA adapters on experts.gate_up_proj (2), q_proj (2)" in caplog.text


class Router(nn.Linear):
    """A linear layer that returns choices, or a product computed in float32."""

    chooses = True

    def forward(self, input: torch.Tensor) -> Any:
        product = nn.functional.linear(input.float(), self.weight.float())
        return product.topk(1) if self.chooses else product


class Routed(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, chooses: bool) -> None:
        super().__init__(LlamaConfig(hidden_size=16, num_attention_heads=2))
        self.router, self.up, self.down = Router(16, 4, bias=False), nn.Linear(16, 16), nn.Linear(16, 16)
        self.router.chooses = chooses


@pytest.mark.parametrize("excluded", [["down"], r".*down", "down"])
def test_what_cant_take_an_adapter_gets_none_whatever_else_is_left_out(excluded: Any) -> None:
    adapted: Any = apply_lora(Routed(True), LoraConfig(exclude_modules=excluded))
    assert adapted.base_model.targeted_module_names == ["up"]


def test_a_layer_that_computes_wider_than_its_weights_is_tried() -> None:
    adapted: Any = apply_lora(Routed(False).bfloat16(), LoraConfig())
    assert set(adapted.base_model.targeted_module_names) == {"router", "up", "down"}


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "more modules": (
        {"target_modules": ["q_proj", "v_proj"]},
        r"on `.*v_proj` and 1 more not in the model, but in the options",
    ),
    "fewer": (
        {"target_modules": r".*\.1\..*q_proj"},
        r"on `model.layers.0.self_attn.q_proj` in the model, not in the options",
    ),
    "all": ({"target_modules": "all-linear"}, r"and 11 more not in the model, but in the options"),
    "excluded": (
        {"target_modules": "q_proj", "exclude_modules": "layers.0.self_attn.q_proj"},
        r"layers.0.* not in the options",
    ),
    "whole": (
        {"modules_to_save": ["lm_head"], "target_modules": "q_proj"},
        r"`lm_head` trained whole not in the model",
    ),
    "a slip": ({"target_modules": ["q_prj"]}, r"no module `q_prj`; fix: did you mean `q_proj`"),
    "DoRA": ({"use_dora": True}, r"use_dora false in the model, true in the options"),
    "rsLoRA": ({"use_rslora": True}, r"use_rslora false in the model, true in the options"),
    "start": ({"init_lora_weights": "gaussian"}, r"init_lora_weights default in the model, gaussian in the options"),
}


@pytest.fixture(scope="module")
def adapters(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    targets = {"llama": ["q_proj"], "mixtral": ["w1", "w2", "w3"]}
    for name, modules in targets.items():
        lora = LoraConfig(rank=4, target_modules=modules)
        PolicyModel.from_pretrained(models[name], lora=lora).save_pretrained(root / name)
    return {name: root / name for name in targets}


@pytest.mark.parametrize("name", OTHER)
def test_an_adapter_that_is_trained_on_isnt_another_than_was_asked_for(adapters: dict[str, Path], name: str) -> None:
    options, message = OTHER[name]
    with pytest.raises(ConfigError, match=message):
        PolicyModel.from_pretrained(adapters["llama"], lora=LoraConfig(rank=4, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": "q_proj"}),
        ("llama", {"target_modules": ".*self_attn.q_proj", "use_dora": False, "init_lora_weights": "default"}),
        ("mixtral", {"target_modules": ["w1", "w2", "w3"], "modules_to_save": []}),
        ("mixtral", {"target_modules": ["gate_up_proj", "down_proj"]}),
    ],
)
def test_the_same_targets_in_other_words_are_the_same(
    adapters: dict[str, Path], name: str, options: dict[str, Any]
) -> None:
    assert PolicyModel.from_pretrained(adapters[name], lora=LoraConfig(rank=4, **options)).has_adapter
