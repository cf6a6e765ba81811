"""A policy under LoRA over a quantised base generates what it trains on, and leaves the base's bits as they were."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from quantised import quantised
from torch import Tensor, nn

from rlhf_core.config.online import SamplingConfig
from rlhf_core.config.training import LoraConfig
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.logprob_gap import logprob_gap
from rlhf_core.generation.native import measure_native
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt than the other"]


def with_random_adapter(policy: PolicyModel) -> PolicyModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # zeros at first
                parameter.normal_(std=0.05)
    return policy


def bits_of(policy: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every weight that is held in bits, not in floating point."""
    return {name: p.detach().clone() for name, p in policy.named_parameters() if not p.is_floating_point()}


def mean_gap(policy: PolicyModel) -> float:
    """Generate, and return how far the log-probabilities are from training's; the base's bits must be as they were."""
    before = bits_of(policy)
    batch = prompt_batch(policy, PROMPTS)
    drawn = Engine(policy).generate(batch, 3, SamplingConfig(max_new_tokens=20, min_new_tokens=20))
    found = logprob_gap(policy, batch, drawn)
    after = bits_of(policy)
    assert before and all(torch.equal(after[name], bits) for name, bits in before.items())
    assert not any("lora" in name for name in before)
    return found.mean


@pytest.mark.parametrize("trained", [False, True])
def test_a_base_in_8_bits(trained: bool) -> None:
    adapted = get_peft_model(quantised(tiny_model()), PeftConfig(r=4, target_modules="all-linear"))
    policy = with_random_adapter(PolicyModel(adapted, tiny_tokenizer()))
    if not trained:
        policy.requires_grad_(False)
    assert policy.measured(measure_native).obstacle is None and mean_gap(policy) < 1e-5
    with adapted.disable_adapter():
        without = policy.generate(PROMPTS, max_new_tokens=20, seed=0)
    assert policy.generate(PROMPTS, max_new_tokens=20, seed=0) != without  # the adapter counts


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed")
@pytest.mark.parametrize(("quantize", "most"), [("4bit", 0.01), ("8bit", 0.05)])
def test_a_base_that_bitsandbytes_quantised(quantize: str, most: float, tmp_path: Path) -> None:
    """Its products are in bf16, and with 8 bits its activations are rounded to them, too."""
    path = save_tiny(tmp_path / "model", layers=2)
    policy = PolicyModel.from_pretrained(path, lora=LoraConfig(rank=4, quantize=quantize))  # type: ignore[arg-type]
    assert mean_gap(with_random_adapter(policy)) < most
