"""`Engine.forwarded`: every token that a model is run on counts once, and what is kept isn't run again."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import make_tiny

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_policy, tiny_tokenizer

PROMPTS = ["1+1=?", "17+25=?"]
SAMPLING = SamplingConfig(max_new_tokens=6, min_new_tokens=2)


def frozen() -> PolicyModel:
    return tiny_policy().requires_grad_(requires_grad=False)


def test_a_prompt_is_forwarded_once_for_its_completions_and_each_drawn_token_once() -> None:
    policy = frozen()
    engine, batch = Engine(policy, seed=0), prompt_batch(policy, PROMPTS)
    drawn = engine.generate(batch, 3, SAMPLING)
    prompts = int((batch.prompt_lengths - 1).sum())
    tokens = sum(len(one.ids) for group in drawn for one in group)
    assert engine.forwarded == prompts + tokens
    engine.generate(batch, 2, SAMPLING, seeds=[[1, 2], [3, 4]])
    again = Engine(policy, seed=0)  # with the prompts that the first one keeps
    drawn = again.generate(batch, 1, SAMPLING)
    assert again.forwarded in (sum(len(one.ids) for group in drawn for one in group) + kept for kept in (0, prompts))


def test_what_a_handle_holds_is_not_forwarded_again() -> None:
    policy = frozen()
    engine = Engine(policy, seed=0)
    (handle,) = engine.prefill([[1, 2, 3, 4, 5]])
    assert engine.forwarded == 4  # the last token is forwarded with what follows it
    first, second = engine.extend([handle, handle], SAMPLING, seeds=[1, 2])
    tokens = len(first.completion.ids) + len(second.completion.ids)
    assert engine.forwarded == 4 + tokens
    engine.score([first.handle], [[7, 8, 9]])
    assert engine.forwarded == 4 + tokens + 3


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_both_loops_and_streams_count_alike(kind: str) -> None:
    """bloom is decoded by transformers' loop."""
    policy = PolicyModel(make_tiny(kind).requires_grad_(requires_grad=False), tiny_tokenizer())
    engine, batch = Engine(policy, seed=0), prompt_batch(policy, PROMPTS[:1])
    (group,) = engine.generate(batch, 1, SAMPLING, seeds=[[1]])
    wanted = int(batch.prompt_lengths[0]) - 1 + len(group[0].ids)
    assert engine.forwarded == wanted
    other = Engine(policy, seed=0, memory=2**24)  # which keeps no prompts of the first one
    *_, last = other.stream(batch, SAMPLING, seed=1)
    assert list(last.ids) == list(group[0].ids) and other.forwarded == wanted


class TwoModels(Sampler):
    """Draws from each of its policies."""

    api = 1
    roles = {"policy": "policy", "draft": "policy"}  # noqa: RUF012

    def sample(self, prompts: Any, n: int = 1, *, seed: int | None = None) -> Any:
        batch = prompt_batch(self.policy, prompts)
        self.engine(seed, "draft").generate(batch, n, SAMPLING)
        return self.engine(seed).generate(batch, n, SAMPLING)


def test_a_sampler_counts_by_role() -> None:
    sampler = TwoModels(policy=frozen(), draft=frozen())
    assert sampler.forwarded == {}
    (group,) = sampler.sample(PROMPTS[:1], 2, seed=0)
    prompt = int(prompt_batch(sampler.policy, PROMPTS[:1]).prompt_lengths[0]) - 1
    assert sampler.forwarded["policy"] == prompt + sum(len(one.ids) for one in group)
    assert sampler.forwarded["draft"] > prompt
    before = sampler.forwarded["draft"]
    sampler.sample(PROMPTS[1:], seed=0)
    assert sampler.forwarded["draft"] > before
