"""Prompts that were read are kept between the engines of a policy: for equal completions, in bounded memory, and no longer than
the policy lives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rlhf_plugins.samplers.generate import GenerateSampler

from rlhf_core.config.online import SamplingConfig
from rlhf_core.data.prompt_rows import read_prompts
from rlhf_core.generation import kept_backend, native_backend
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.kept_backend import forget_kept
from rlhf_core.generation.native import NativeDecoding, measure_native
from rlhf_core.generation.native_backend import NativeBackend
from rlhf_core.generation.sampled_rows import sample_rows
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

SIZE = 4
"""Tokens per block in these tests."""
SYSTEM = "You answer in one short sentence, and you say so where you don't know. "
QUESTIONS = [SYSTEM + question for question in ("Why?", "How so?", "Since when?")]


def made(model: torch.nn.Module | None = None, *, trained: bool = False) -> PolicyModel:
    policy = PolicyModel((model or tiny_model()).requires_grad_(trained), tiny_tokenizer())
    policy.measured(measure_native)
    return policy


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the tokens of each forward pass."""
    monkeypatch.setattr(native_backend, "BLOCK_SIZE", {"cpu": SIZE})
    counts: list[int] = []
    forward = NativeDecoding._forward

    def counted(self: NativeDecoding, ids: list[int], *rest: Any) -> torch.Tensor:
        counts.append(len(ids))
        return forward(self, ids, *rest)

    monkeypatch.setattr(NativeDecoding, "_forward", counted)
    yield counts


def asked(policy: PolicyModel, question: str, tokens: int = 3) -> list[int]:
    return list(policy.generate([question], max_new_tokens=tokens, min_new_tokens=tokens, seed=1)[0][0].ids)


def test_what_prompts_have_in_common_is_read_once_for_several_calls(forwarded: list[int]) -> None:
    fresh = [asked(made(), question) for question in QUESTIONS]
    policy = made()
    alone = prompt_batch(policy, QUESTIONS).prompt_lengths.tolist()
    forwarded.clear()
    assert [asked(policy, question) for question in QUESTIONS] == fresh
    common = len(policy.tokenizer(SYSTEM)["input_ids"])
    # A prompt's last token is the first that decoding forwards.
    assert sum(forwarded) <= sum(alone) - 2 * (common - 2) + 2 * 3
    forwarded.clear()
    sampler = GenerateSampler(GenerateSampler.Config(max_new_tokens=3, min_new_tokens=3), policy=policy)
    assert [list(one.ids) for (one,) in sampler.sample(QUESTIONS[:1], seed=1)] == fresh[:1]
    assert forwarded == [1, 1, 1]  # nothing but decoding


def test_batches_of_a_file_read_what_their_prompts_have_in_common_once(forwarded: list[int]) -> None:
    """As `rlhf sample` goes through the rows of a file, with an engine for each batch."""
    policy = made()
    sampler = GenerateSampler(GenerateSampler.Config(max_new_tokens=3, min_new_tokens=3), policy=policy)
    rows = list(read_prompts(QUESTIONS, columns={}, name="--prompts"))
    lengths = prompt_batch(policy, QUESTIONS).prompt_lengths.tolist()

    def ids(together: int) -> list[list[int]]:
        found = sample_rows(sampler, rows, n=2, seed=0, together=together)
        return [list(one.ids) for _, completions in found for one in completions]

    all_at_once = ids(3)
    forget_kept(policy)
    forwarded.clear()
    assert ids(1) == all_at_once
    common = len(policy.tokenizer(SYSTEM)["input_ids"])
    assert sum(forwarded) <= sum(lengths) - 2 * (common - 2) + 2 * 3 * 3


def test_nothing_is_kept_when_weights_or_adapters_change(forwarded: list[int]) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(
        tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    policy = made(adapted)
    with_adapter = asked(policy, QUESTIONS[0], 8)
    with adapted.disable_adapter():
        assert asked(policy, QUESTIONS[0], 8) == asked(made(tiny_model()), QUESTIONS[0], 8) != with_adapter
    assert asked(policy, QUESTIONS[0], 8) == with_adapter
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    changed = asked(policy, QUESTIONS[0], 8)
    (engine_of_its_own,) = Engine(policy, seed=1, most_rows=8).generate(
        prompt_batch(policy, QUESTIONS[:1]), 1, SamplingConfig(max_new_tokens=8, min_new_tokens=8)
    )
    assert changed == list(engine_of_its_own[0].ids)


def test_a_policy_that_is_trained_holds_no_cache_between_calls(forwarded: list[int]) -> None:
    policy = made(trained=True)
    asked(policy, QUESTIONS[0])
    assert kept_backend._left[policy]._native is None


def test_an_engine_in_use_shares_its_cache_with_no_other(forwarded: list[int]) -> None:
    policy = made()
    sampling = SamplingConfig(max_new_tokens=6, min_new_tokens=6)
    batch = prompt_batch(policy, QUESTIONS[:1])
    expected = asked(made(), QUESTIONS[0], 6)
    first = Engine(policy, seed=1)
    stream = first.stream(batch, sampling)
    next(stream)
    second = Engine(policy, seed=1)
    assert first.backend is not second.backend
    assert list(second.generate(batch, 1, sampling)[0][0].ids) == expected
    assert list([*stream][-1].ids) == expected
    handles = second.prefill([[1, 2, 3, 4, 5, 6]])
    del second  # but its handles hold it
    assert Engine(policy).backend is not handles[0].engine.backend


def test_threads_get_the_completions_that_they_would_get_alone(forwarded: list[int]) -> None:
    policy = made()
    expected = {question: asked(made(), question, 12) for question in QUESTIONS}
    questions = [question for question in QUESTIONS for _ in range(4)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda question: asked(policy, question, 12), questions))
    assert found == [expected[question] for question in questions]


def test_what_is_kept_goes_with_the_policy(forwarded: list[int]) -> None:
    policy = made()
    gc.collect()
    gc.disable()
    try:
        asked(policy, QUESTIONS[0])
        backend = weakref.ref(kept_backend._left[policy])
        gone = weakref.ref(policy)
        del policy
        assert gone() is None and backend() is None
    finally:
        gc.enable()


def test_a_chat_template_that_refuses_doesnt_keep_an_engine(forwarded: list[int]) -> None:
    policy = made()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}{{ '<assistant>' }}"
    )
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            policy.generate([[{"role": "user", "content": SYSTEM}]], max_new_tokens=2, seed=1)
            assert policy in kept_backend._left
    finally:
        gc.enable()


def test_an_idle_policy_keeps_few_prompts_and_the_memory_of_no_others(
    forwarded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = made()
    bytes_per_block = policy.measured(measure_native).elements * SIZE * 4
    monkeypatch.setattr(native_backend, "free_bytes", lambda device: bytes_per_block * 400)
    expected = asked(made(), QUESTIONS[0])
    long = [f"{number} is the number of a prompt that is as long as this one" for number in range(30)]
    policy.generate(long, 4, max_new_tokens=20, min_new_tokens=20, seed=1)
    backend = kept_backend._left[policy]
    assert isinstance(backend, NativeBackend) and backend._native is not None
    cache, kept = backend._native.cache, len(backend._native.prefixes)
    assert 0 < kept < 30 and cache.used_blocks <= 400 // native_backend.IDLE_SHARE
    assert cache.num_sequences == kept
    assert all(len(pool) <= 2 * cache.used_blocks for pools in cache.pools.values() for pool in pools)
    assert asked(policy, QUESTIONS[0]) == expected
