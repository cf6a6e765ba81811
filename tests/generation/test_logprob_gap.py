"""The gap between generation's log-probabilities and training's for the same tokens is bounded."""

from __future__ import annotations

import pytest
import torch
from architectures import make_tiny
from generation_gap import gap_of_transformers

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.logprob_gap import logprob_gap
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt than the others"]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral", "bloom"])
def test_float32(kind: str) -> None:
    policy = PolicyModel(make_tiny(kind), tiny_tokenizer())
    batch = prompt_batch(policy, PROMPTS)
    drawn = Engine(policy).generate(batch, 3, SamplingConfig(max_new_tokens=10, temperature=0.8, top_p=0.9))
    gap = logprob_gap(policy, batch, drawn)
    assert 0 <= gap.mean <= gap.max <= 1e-4


@pytest.mark.parametrize(("sharpness", "most"), [(0.5, 1.3), (1.0, 2.0)])
def test_bf16_compared_with_generate_and_its_own_forward_pass(sharpness: float, most: float) -> None:
    """As near as transformers; where logits are sharp, and training's attention in float32 is exacter, not much further."""
    model = tiny_model(layers=6, hidden=256, heads=4, kv_heads=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharpness if parameter.dim() > 1 else 1)
    policy = PolicyModel(model, tiny_tokenizer()).set_options(precision="bf16")
    batch = prompt_batch(policy, PROMPTS)
    count = 24
    drawn = Engine(policy).generate(batch, 12, SamplingConfig(max_new_tokens=count, min_new_tokens=count))
    ours = logprob_gap(policy, batch, drawn)
    theirs = gap_of_transformers(policy.causal_lm.to(torch.bfloat16), batch, count, n=12)
    assert 0 < ours.mean < most * theirs.mean
