"""A model's own dropout is off in training unless asked for, however the model draws it; adapters keep what they were given."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_core import registry
from rlhf_core.config.training import LoraConfig
from rlhf_core.models import PolicyModel, apply_lora
from rlhf_core.models.dropout import allow_dropout, disable_dropout, evaluating, set_training
from rlhf_core.testing.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer

IDS = torch.randint(7, 263, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=2, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    """Dropout as numbers of layers that recompute themselves, and layers that are skipped."""
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, **sizes, **TOKENS, dropout=0.3, attention_dropout=0.3, layerdrop=0.5)
    )


def llama() -> nn.Module:
    """Dropout as a number that the attention function is handed."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, **TOKENS, intermediate_size=64, attention_dropout=0.5)
    )


def falcon() -> nn.Module:
    """Dropout read from the configuration while it runs."""
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(**SMALL, **TOKENS, hidden_dropout=0.3, attention_dropout=0.3)
    )


def mixtral() -> nn.Module:
    """Noise in the router."""
    sizes = {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, **sizes, **TOKENS, router_jitter_noise=0.3, attention_dropout=0.2)
    )


def phimoe() -> nn.Module:
    """Experts drawn at random, by no number that could be set to zero."""
    sizes = {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(**SMALL, **sizes, **TOKENS, router_jitter_noise=0.5)
    )


MODELS: list[Callable[[], nn.Module]] = [gpt2, opt, llama, falcon, mixtral, phimoe]


def spread(model: nn.Module) -> nn.Module:
    """Make weights large enough that dropout shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_training_forwards_as_evaluation_does(make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    model = spread(make())
    before, expected = model.config.to_dict(), logits(model)
    set_training(model)
    torch.manual_seed(0)
    assert not torch.equal(logits(model), logits(model)), "it draws nothing, so this test shows nothing"
    state = torch.get_rng_state()
    assert disable_dropout(model, adapters=True) > 0
    assert torch.equal(torch.get_rng_state(), state)
    set_training(model)
    assert model.training and model.config.to_dict() == before and not caplog.records
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    allow_dropout(model)
    set_training(model)
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("make", [gpt2, opt, falcon], ids=lambda make: make.__name__)
def test_gradient_checkpointing_stays_on_and_changes_nothing(make: Callable[[], nn.Module]) -> None:
    plain = spread(make())
    recomputing = copy.deepcopy(plain)
    recomputing.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    for layer in recomputing.modules():
        if isinstance(layer, transformers.modeling_layers.GradientCheckpointingLayer):
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
            inner = next(
                module
                for module in layer.modules()
                if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
            )
            inner.register_forward_pre_hook(lambda *_: calls.append(100))
    for model in (plain, recomputing):
        disable_dropout(model, adapters=True)
        set_training(model)
    calls.clear()
    for model in (plain, recomputing):
        logits(model).square().mean().backward()
    assert sum(calls) == 2 * (1 + 2 * 100)  # Two layers, each computed twice.
    for (name, expected), found in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_adapters_keep_the_dropout_that_was_asked_for() -> None:
    model = spread(apply_lora(gpt2(), LoraConfig(rank=2, dropout=0.5)))
    expected = logits(model)
    disable_dropout(model, adapters=False)
    set_training(model)
    assert not torch.equal(logits(model), logits(model))
    disable_dropout(model, adapters=True)
    set_training(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_a_copy_is_as_still() -> None:
    model = spread(opt())
    model.activation_checkpointing_enable({"use_reentrant": False})
    disable_dropout(model, adapters=True)
    twin = copy.deepcopy(model)
    set_training(twin)
    torch.testing.assert_close(logits(twin), logits(model), rtol=1e-5, atol=1e-6)


def test_what_stays_random_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5)  # Whatever its mode.

    model = spread(llama())
    model.model.layers[0].mlp.down_proj = Noisy(64, 32)
    disable_dropout(model, adapters=True)
    assert "differs from that in evaluation" in caplog.text and len(caplog.records) == 1


def test_a_mode_comes_back_part_by_part() -> None:
    model = gpt2()
    disable_dropout(model, adapters=True)
    set_training(model)
    modes = {name: part.training for name, part in model.named_modules()}
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert {name: part.training for name, part in model.named_modules()} == modes and len(set(modes.values())) == 2


PAIRS = [{"prompt": "2 + 3", "chosen": "= 5", "rejected": "= 7 or so"}] * 8


def first_step(method: str, model: nn.Module, **options: Any) -> dict[str, float]:
    cls = registry.get("trainer", method)
    values = {"max_steps": 1, "batch_size": 8, "max_length": 48, "logging": {"progress": False}, **options}
    rows = PAIRS if cls.record == "preference" else [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    policy = PolicyModel(copy.deepcopy(model), tiny_tokenizer())
    return cls(cls.Config(**values), model=policy, data=rows).train().metrics


def test_the_first_dpo_loss_is_ln_2_unless_dropout_is_kept() -> None:
    model = spread(gpt2())
    assert first_step("dpo", model)["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(first_step("dpo", model, dropout="keep")["loss"] - 0.6931472) > 1e-4


@pytest.mark.parametrize("method", ["sft", "dpo", "reward_model"])
def test_micro_batches_change_no_gradient(method: str) -> None:
    model = spread(gpt2())
    whole = first_step(method, model, learning_rate=1e-3)
    cut = first_step(method, model, learning_rate=1e-3, micro_batch_size=1)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_model_without_dropout_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    with caplog.at_level(logging.INFO):
        assert disable_dropout(model, adapters=True) == 0
    set_training(model)
    assert all(part.training for part in model.modules()) and not caplog.records
