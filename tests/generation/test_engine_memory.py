"""The engine's cache: shared, bounded, kept while weights are the same, and released whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation import native, native_backend
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.native import NativeDecoding, measure_native
from rlhf_core.infra.errors import NumbersError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

SIZE = 4
"""Tokens per block in these tests."""
TEXTS = ["one prompt of thirty characters", "another prompt", "c"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_backend, "BLOCK_SIZE", {"cpu": SIZE})


def made(*, trained: bool = False) -> PolicyModel:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return PolicyModel(model.requires_grad_(trained), tiny_tokenizer())


def unread() -> PolicyModel:
    """Return a policy for which no engine has kept anything."""
    policy = made()
    policy.measured(measure_native)
    return policy


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return made()


@pytest.fixture(scope="module")
def batch(policy: PolicyModel) -> Batch:
    return prompt_batch(policy, TEXTS)


def sampling(tokens: int = 10, **options: Any) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=tokens, min_new_tokens=tokens, **options)


def drawn(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[list(one.ids) for one in group] for group in groups]


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return list(itertools.chain(*groups))


def bytes_for(policy: PolicyModel, blocks: int) -> int:
    """Return the memory of a cache of so many blocks."""
    return policy.measured(measure_native).elements * SIZE * 4 * blocks


def loop(engine: Engine) -> NativeDecoding:
    found = engine.backend._native
    assert found is not None
    return found


@contextlib.contextmanager
def forwarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Record the ids that reach the model in each forward pass."""
    passes: list[list[int]] = []
    forward = NativeDecoding._forward

    def recorded(self: NativeDecoding, ids: list[int], *rest: Any) -> torch.Tensor:
        passes.append(list(ids))
        return forward(self, ids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(NativeDecoding, "_forward", recorded)
        yield passes


def test_a_cache_too_small_for_the_work_finishes_it(policy: PolicyModel, batch: Batch) -> None:
    seeds = [[prompt * 10 + k for k in range(4)] for prompt in range(3)]
    whole = Engine(policy).generate(batch, 4, sampling(), seeds=seeds)
    preemptions = []
    for blocks in (12, 14, 20, 200):
        engine = Engine(policy, memory=bytes_for(policy, blocks))
        ended: list[tuple[int, int]] = []
        found = engine.generate(
            batch, 4, sampling(), seeds=seeds, finished=lambda prompt, k, one, ended=ended: ended.append((prompt, k))
        )
        assert drawn(found) == drawn(whole)
        for one, other in zip(flat(found), flat(whole), strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert sorted(ended) == [(prompt, k) for prompt in range(3) for k in range(4)]
        assert loop(engine).cache.capacity <= blocks
        preemptions.append(loop(engine).preemptions)
    assert preemptions[1] > 0 and preemptions[-1] == 0


@pytest.mark.parametrize("seed", range(8))
def test_prompts_that_begin_alike_fit_into_little_memory(seed: int) -> None:
    """A kept prompt holds all of its blocks as long as another shares its first ones, but never in the way of the work."""
    draw = random.Random(seed)
    small = PolicyModel(tiny_model(max_positions=1024).requires_grad_(False), tiny_tokenizer())
    common = "".join(draw.choice("abc") for _ in range(draw.choice([60, 130, 200])))
    prompts = [
        common[: draw.randint(20, len(common))] + "".join(draw.choice("xyz") for _ in range(draw.randint(1, 150)))
        for _ in range(4)
    ]
    rows = prompt_batch(small, prompts)
    # Among few tokens a random number hardly ever lies so close to a border that rounding moves it across.
    sampling = SamplingConfig(max_new_tokens=draw.choice([1, 5, 70]), temperature=0.8, top_k=4)
    blocks = -(-(int(rows.prompt_lengths.max()) + sampling.max_new_tokens) // 64) + draw.randint(1, 3)
    memory = blocks * 64 * 4 * small.measured(measure_native).elements
    n = draw.randint(1, 3)
    whole = Engine(small, seed=1).generate(rows, n, sampling)
    tight = Engine(small, seed=1, memory=memory).generate(rows, n, sampling)
    assert [[one.ids for one in group] for group in tight] == [[one.ids for one in group] for group in whole]


def test_a_cache_too_small_for_one_completion_says_so(policy: PolicyModel, batch: Batch) -> None:
    for blocks in (1, 3, 8, 9):  # too few for the prompt, or for the prompt and its completion
        engine = Engine(policy, memory=bytes_for(policy, blocks))
        with pytest.raises(NumbersError, match="doesn't suffice for one completion") as caught:
            engine.generate(batch.select([0]), 3, sampling())
        assert caught.value.got == f"room for {blocks * SIZE} tokens"
        if blocks > 1:  # what fits is still drawn
            assert len(engine.generate(batch.select([2]), 1, sampling(1))[0]) == 1
    engine = Engine(policy, memory=bytes_for(policy, 12))
    handle = engine.prefill([list(range(10, 38))])[0]
    with pytest.raises(NumbersError, match="doesn't suffice") as caught:
        engine.generate(batch.select([0]), 1, sampling())
    assert "shared with 1 other sequence" in str(caught.value.got)
    engine.free([handle])
    engine.generate(batch.select([0]), 1, sampling())


def test_rows_join_as_others_leave(policy: PolicyModel, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [[3, 9, 5], [1, 2, 8], [4, 6, 7]]
    seeds = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    whole = Engine(policy).generate(batch, 3, SamplingConfig(max_new_tokens=9), seeds=seeds, limits=limits)
    sizes = []
    step = NativeDecoding._decode_step

    def counted(self: NativeDecoding, partly: bool) -> Any:
        sizes.append(len(self._rows))
        return step(self, partly)

    monkeypatch.setattr(NativeDecoding, "_decode_step", counted)
    engine = Engine(policy, most_rows=2)
    found = engine.generate(batch, 3, SamplingConfig(max_new_tokens=9), seeds=seeds, limits=limits)
    assert drawn(found) == drawn(whole) and max(sizes) == 2
    tokens = sum(len(one.ids) for one in flat(found))
    # A row that ends leaves its place at once: no step has an ended row, and hardly one an empty place.
    assert sum(sizes) == tokens and len(sizes) <= tokens / 2 + 9


def test_a_prompt_is_read_once(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = unread()
    lengths = batch.prompt_lengths.tolist()
    with forwarded(monkeypatch) as passes:
        engine = Engine(policy)
        engine.generate(batch, 5, sampling(3))
        engine.generate(batch, 5, sampling(3))  # and kept, as the weights are the same
    # The last token of a prompt is the first that each row forwards.
    assert sum(map(len, passes)) == sum(length - 1 for length in lengths) + 2 * 3 * 15
    assert len(passes[0]) == sum(length - 1 for length in lengths)  # all prompts in one pass
    twice = prompt_batch(policy, [TEXTS[0], TEXTS[0] + " and more", TEXTS[0]])
    policy = unread()
    with forwarded(monkeypatch) as passes:
        Engine(policy).generate(twice, 1, sampling(1))
    assert len(passes[0]) < sum(twice.prompt_lengths.tolist()) - lengths[0]


def test_long_prompts_hold_nobody_up(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CHUNK", {"cpu": 8})
    monkeypatch.setattr(native, "CHUNKS_FIRST", 1)
    batch = prompt_batch(policy, ["a", "b" * 100])
    seeds = [[1], [2]]
    with forwarded(monkeypatch) as passes:
        found = Engine(policy).generate(batch, 1, sampling(20), seeds=seeds)
    assert max(map(len, passes)) <= 9
    length = batch.prompt_lengths.tolist()[1] - 1
    reading = [number for number, ids in enumerate(passes) if len(ids) > 2]
    # Between two parts of the long prompt the other row gets its next token.
    assert len(reading) >= length // 8 and all(b - a >= 2 for a, b in itertools.pairwise(reading))
    monkeypatch.undo()
    assert drawn(found) == drawn(Engine(policy).generate(batch, 1, sampling(20), seeds=seeds))


def test_one_completion_each_of_many_prompts(policy: PolicyModel) -> None:
    batch = prompt_batch(policy, [f"prompt {number}" * (1 + number % 3) for number in range(40)])
    seeds = [[number] for number in range(40)]
    few = Engine(policy, most_rows=7, memory=bytes_for(policy, 60)).generate(batch, 1, sampling(4), seeds=seeds)
    assert drawn(few) == drawn(Engine(policy).generate(batch, 1, sampling(4), seeds=seeds))


def test_memory_is_bounded_and_a_trained_policy_gets_it_all(batch: Batch) -> None:
    frozen, trained = made(), made(trained=True)
    engine = Engine(frozen)
    engine.generate(batch, 2, sampling())
    assert loop(engine).cache.num_sequences == len(loop(engine).prefixes) == 3
    engine = Engine(trained)
    engine.generate(batch, 2, sampling())
    assert engine.backend._native is None
    (handle,) = engine.prefill([[50, 51, 52]])
    engine.generate(batch, 2, sampling())
    assert loop(engine).cache.num_sequences == 1  # the handle's
    assert engine.score([handle], [[60]])[0].shape == (1,)
    engine.free([handle])
    assert engine.backend._native is None


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
def test_whatever_ends_a_call_leaves_nothing(batch: Batch, error: type[BaseException], trained: bool) -> None:
    policy = made(trained=trained)
    policy.train()
    own = policy.causal_lm.generation_config
    whole = drawn(Engine(policy, seed=3).generate(batch, 3, sampling()))
    engine = Engine(policy, seed=3)

    def stop(*_: object) -> None:
        raise error

    def in_the_middle(ids: Any) -> bool:
        if len(ids) == 2:
            raise error
        return False

    handles = engine.prefill([[60, 61], [62]])
    calls = (
        lambda: engine.generate(batch, 3, sampling(), finished=stop),
        lambda: engine.extend(handles, sampling(), seeds=[1, 2], rule=in_the_middle),
    )
    for call in calls:
        with pytest.raises(error):
            call()
    stream = engine.stream(batch.select([0]), sampling(), seed=1)
    next(stream), next(stream)
    stream.close()
    engine.free(handles)
    found = engine.backend._native
    assert found is None if trained else found.cache.num_sequences == len(found.prefixes)
    assert policy.training and policy.causal_lm.generation_config is own and torch.is_grad_enabled()
    assert drawn(Engine(policy, seed=3).generate(batch, 3, sampling())) == whole
    engine._met.clear()
    assert drawn(engine.generate(batch, 3, sampling())) == whole


def test_a_call_within_a_call(policy: PolicyModel, batch: Batch) -> None:
    """A completion that has ended may be judged by the same engine while others are being drawn."""
    seeds = [[1, 2], [3, 4], [5, 6]]
    limits = [[2, 9], [4, 5], [9, 3]]
    options = {"seeds": seeds, "limits": limits}
    whole = Engine(policy).generate(batch, 2, SamplingConfig(max_new_tokens=9), **options)
    engine = Engine(policy)
    inner: list[list[list[list[int]]]] = []

    def judge(prompt: int, k: int, one: Completion) -> None:
        assert not torch.is_autocast_enabled("cpu")
        inner.append(drawn(engine.generate(batch.select([1]), 1, sampling(3), seeds=[[7]])))
        handles = engine.prefill([[30, *one.ids]])
        engine.score(handles, [[40]])
        engine.free(handles)

    found = engine.generate(batch, 2, SamplingConfig(max_new_tokens=9), finished=judge, **options)
    assert drawn(found) == drawn(whole)
    assert inner == [inner[0]] * 6
    assert loop(engine).cache.num_sequences == len(loop(engine).prefixes)


def test_two_engines_share_a_policy(policy: PolicyModel, batch: Batch) -> None:
    first, second = Engine(policy, seed=1), Engine(policy, seed=1)
    expected = drawn(first.generate(batch, 2, sampling()))
    assert drawn(second.generate(batch, 2, sampling())) == expected
    handles = first.prefill([[50, 51]])
    second.generate(batch, 2, sampling(3))
    assert first.score(handles, [[60]])[0].shape == (1,)
