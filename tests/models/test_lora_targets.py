"""Adapters go where peft puts them: names, ends of names, regular expressions, embeddings, expert projections, whole modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from rlhf_core.config import LoraConfig
from rlhf_core.errors import ConfigError
from rlhf_core.models import PolicyModel
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
    made = {"gpt2": gpt2, "mixtral": MixtralForCausalLM(MixtralConfig(**shape, **small, **few))}
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
        r"lora: peft can.t put .*got .*\.\*nothing.*fix: name modules",
    ),
    "no such kind": (
        {"target_modules": ["input_layernorm"]},
        r"lora: peft can't put .*LlamaRMSNorm.* is not supported",
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
