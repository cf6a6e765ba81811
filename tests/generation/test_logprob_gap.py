"""The gap between generation's log-probabilities and training's for the same tokens is bounded."""

from __future__ import annotations

import pytest
from architectures import make_tiny

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.logprob_gap import logprob_gap
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_tokenizer

PROMPTS = ["a", "a longer prompt than the others"]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral", "bloom"])
def test_float32(kind: str) -> None:
    policy = PolicyModel(make_tiny(kind), tiny_tokenizer())
    batch = prompt_batch(policy, PROMPTS)
    drawn = Engine(policy).generate(batch, 3, SamplingConfig(max_new_tokens=10, temperature=0.8, top_p=0.9))
    gap = logprob_gap(policy, batch, drawn)
    assert 0 <= gap.mean <= gap.max <= 1e-4
