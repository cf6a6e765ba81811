"""Batches that prompts join and leave while others are drawn: completions are those of `Engine.generate`."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.config.online import SamplingConfig
from rlhf_core.config.training import LoraConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.data.collate import collate
from rlhf_core.data.encoder import EncodedRow
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.lookup_drafts import NgramDrafter
from rlhf_core.generation.native import NativeDecoding
from rlhf_core.generation.open_batch import OpenBatch
from rlhf_core.infra.errors import ConfigError, DataError, NumbersError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

LONG = list(range(10, 90))
PROMPTS = [LONG, [40], [*LONG[:70], 3, 4, 5], LONG, [200, 201, 40]]
OPTIONS = [
    SamplingConfig(max_new_tokens=14),
    SamplingConfig(max_new_tokens=9, temperature=0),
    SamplingConfig(max_new_tokens=20, temperature=0.6, top_p=0.8),
    SamplingConfig(max_new_tokens=12, top_k=9, min_p=0.02, stop=[*"etaoinshrdlu0123456789", "zz"]),
]
"""What one batch may hold beside each other."""


def made(kind: str, **options: Any) -> PolicyModel:
    """Return a tiny policy whose distributions aren't even."""
    model = tiny_model(**options) if kind == "tiny" else make_tiny(kind, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return PolicyModel(model.requires_grad_(False), tiny_tokenizer())


@pytest.fixture(scope="module", params=["tiny", "bloom", "window"])
def policy(request: pytest.FixtureRequest) -> PolicyModel:
    """Return a policy that is decoded over the paged cache, one by transformers' loop, and one that changes at a length."""
    return made("mistral", sliding_window=90) if request.param == "window" else made(request.param)


@pytest.fixture
def engine(policy: PolicyModel) -> Iterator[Engine]:
    engine = Engine(policy)
    yield engine
    gc.collect()
    native = engine.backend._native
    assert native is None or native.cache.num_sequences == len(native.prefixes)  # nothing but kept prompts


def alone(policy: PolicyModel, ids: list[int], seed: int, sampling: SamplingConfig) -> Completion:
    """Return what `Engine.generate` draws."""
    batch = collate([EncodedRow(0, ids)])
    return Engine(policy).generate(batch, sampling=sampling, seeds=[[seed]])[0][0]


def finish(batch: OpenBatch, found: dict[int, Completion], steps: int = 10_000) -> None:
    """Step until all have ended, or so often."""
    for _ in range(steps):
        if not len(batch):
            return
        found |= {grown.number: grown.completion for grown in batch.step() if grown.ended}


def assert_same(found: Completion, wanted: Completion) -> None:
    assert found.ids == wanted.ids and found.text == wanted.text and found.stop_reason == wanted.stop_reason
    for name in ("logprobs", "raw_logprobs", "kept_mass"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), abs=1e-4)


def test_whoever_joins_draws_what_it_draws_alone(policy: PolicyModel, engine: Engine) -> None:
    found: dict[int, Completion] = {}
    wanted: dict[int, Completion] = {}
    with engine.open() as batch:
        for seed, ids in enumerate(PROMPTS * 3):
            sampling = OPTIONS[seed % len(OPTIONS)]
            wanted[batch.join(ids, seed=seed, sampling=sampling)] = alone(policy, ids, seed, sampling)
            finish(batch, found, steps=seed % 4)
        assert len(batch) == len(wanted) - len(found)
        finish(batch, found)
        assert not len(batch) and batch.step() == []
    assert found.keys() == wanted.keys()
    for number, completion in found.items():
        assert_same(completion, wanted[number])
    assert {one.stop_reason for one in found.values()} >= {"length", "stop"}


def test_whoever_leaves_changes_nothing_for_the_others(policy: PolicyModel, engine: Engine) -> None:
    found: dict[int, Completion] = {}
    chosen = random.Random(1)
    with engine.open(OPTIONS[2]) as batch:
        numbers = [batch.join(ids, seed=seed) for seed, ids in enumerate(PROMPTS * 2)]
        leaving = set(chosen.sample(numbers, 5))
        for count, number in enumerate(sorted(leaving)):
            batch.leave(number)  # some before they are read, some while they are drawn
            batch.leave(number)
            finish(batch, found, steps=count)
        finish(batch, found)
    assert found.keys() == set(numbers) - leaving
    for number, completion in found.items():
        assert_same(completion, alone(policy, (PROMPTS * 2)[number], number, OPTIONS[2]))


def test_a_completion_is_seen_as_it_grows(policy: PolicyModel, engine: Engine) -> None:
    sampling = SamplingConfig(max_new_tokens=12, top_k=9, stop=["zz", "qu"])
    with engine.open() as batch:
        watched = batch.join(LONG, seed=3, sampling=sampling, partly=True)
        batch.join(LONG, seed=4, sampling=OPTIONS[0])
        texts, lengths = [], []
        while len(batch):
            for grown in batch.step():
                if grown.number == watched:
                    texts.append(grown.completion.text)
                    lengths.append(len(grown.completion.ids))
                    whole = grown
    assert_same(whole.completion, alone(policy, LONG, 3, sampling))
    assert lengths == list(range(1, len(whole.completion.ids) + 1)) and len(texts) > 2
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_the_most_likely_tokens_are_those_of_scoring(policy: PolicyModel, engine: Engine) -> None:
    with engine.open(OPTIONS[0]) as batch:
        plain, five = batch.join(LONG, seed=1, sampling=OPTIONS[2]), batch.join([40], seed=2, top=5)
        one = batch.join(LONG, seed=1, top=1)
        grown = {}
        while len(batch):
            grown |= {each.number: each for each in batch.step()}
    assert not grown[plain].top
    for number, prompt, k in ((five, [40], 5), (one, LONG, 1)):
        completion, top = grown[number].completion, grown[number].top
        (handle,) = engine.prefill([prompt])
        (scored,) = engine.score_with_top([handle], [completion.ids], k)
        assert [[token for token, _ in each] for each in top] == scored.top.ids.tolist()
        assert torch.tensor([[logprob for _, logprob in each] for each in top]) == pytest.approx(
            scored.top.logprobs, abs=1e-4
        )
        assert completion.raw_logprobs == pytest.approx(scored.logprobs.tolist(), abs=1e-4)


def test_handles_are_used_between_steps(policy: PolicyModel, engine: Engine) -> None:
    (before,) = engine.score(engine.prefill([LONG]), [[7, 8, 9]])
    found: dict[int, Completion] = {}
    with engine.open() as batch:
        batch.join(LONG, seed=0, sampling=OPTIONS[0])
        finish(batch, found, steps=3)
        (during,) = engine.score(engine.prefill([LONG]), [[7, 8, 9]])
        made = engine.generate(collate([EncodedRow(0, LONG)]), sampling=OPTIONS[2], seeds=[[5]])[0][0]
        finish(batch, found)
    assert during.tolist() == pytest.approx(before.tolist(), abs=1e-4)
    assert_same(found[0], alone(policy, LONG, 0, OPTIONS[0]))
    assert_same(made, alone(policy, LONG, 5, OPTIONS[2]))


def test_a_prompt_is_read_once_for_its_completions() -> None:
    policy, counted = made("tiny"), list[int]()
    engine = Engine(policy, counted=counted.append, memory=2**24)
    found: dict[int, Completion] = {}
    with engine.open() as batch:
        for seed in range(4):
            batch.join(LONG, seed=seed, sampling=OPTIONS[0])
        finish(batch, found)
        batch.join(LONG, seed=9, sampling=OPTIONS[0])  # kept since then
        finish(batch, found)
    # Each token drawn is read once but the last, and the prompt's last token for each completion.
    assert sum(counted) <= len(LONG) + sum(len(one.ids) for one in found.values())


def test_rows_that_give_way_to_others_lose_nothing() -> None:
    policy = made("tiny")
    engine = Engine(policy, memory=5 * 64 * 2 * 2 * 2 * 16 * 4)  # five blocks of 64 tokens
    sampling, found = SamplingConfig(max_new_tokens=70, min_new_tokens=60), dict[int, Completion]()
    with engine.open(sampling) as batch:
        for seed in range(5):
            batch.join(PROMPTS[seed], seed=seed, top=2)
            finish(batch, found, steps=2)
        batch.leave(4)
        finish(batch, found)
        assert engine.backend._native.preemptions > 0
    for seed in range(4):
        assert_same(found[seed], alone(policy, PROMPTS[seed], seed, sampling))


def test_where_memory_runs_out_fewer_rows_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sizes = made("tiny"), list[int]()
    step = NativeDecoding.step

    def failing(self: NativeDecoding, **options: Any) -> Any:
        sizes.append(self.most_rows)
        if self.most_rows > 2 and len(sizes) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, **options)

    monkeypatch.setattr(NativeDecoding, "step", failing)
    found: dict[int, Completion] = {}
    with Engine(policy).open(OPTIONS[0]) as batch:
        for seed, ids in enumerate(PROMPTS):
            batch.join(ids, seed=seed)
        finish(batch, found)
    monkeypatch.undo()
    assert sizes[-1] == 2
    for seed, ids in enumerate(PROMPTS):
        assert_same(found[seed], alone(policy, ids, seed, OPTIONS[0]))

    def never(self: NativeDecoding, **options: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(NativeDecoding, "step", never)
    with Engine(policy).open(OPTIONS[0]) as batch, pytest.raises(NumbersError, match="one completion at a time"):
        batch.join(LONG, seed=0)
        finish(batch, found)


def test_a_batch_is_one_of_one_policy() -> None:
    policy = PolicyModel(tiny_model(), tiny_tokenizer())
    engine = Engine(policy)
    with engine.open() as batch:
        batch.join(LONG, seed=0)
        batch.step()
        with torch.no_grad():
            policy.head.weight.mul_(1.5)
        with pytest.raises(ConfigError, match="weights have changed"):
            batch.step()
    batch.close()
    with engine.open() as batch:
        found: dict[int, Completion] = {}
        batch.join(LONG, seed=0, sampling=OPTIONS[1])
        finish(batch, found)
    assert_same(found[0], alone(policy, LONG, 0, OPTIONS[1]))


def test_adapters_draw_in_an_open_batch() -> None:
    policy = made("tiny").set_options(lora=LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                # Larger updates would make rounding larger, too.
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    found: dict[int, Completion] = {}
    with Engine(policy).open() as batch:
        for seed, ids in enumerate(PROMPTS):
            batch.join(ids, seed=seed, sampling=OPTIONS[1])
        finish(batch, found)
    for seed, ids in enumerate(PROMPTS):
        assert_same(found[seed], alone(policy, ids, seed, OPTIONS[1]))


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"sampling": SamplingConfig(min_new_tokens=3)}, ConfigError, "min_new_tokens"),
        ({"sampling": SamplingConfig(repetition_penalty=1.2)}, ConfigError, "repetition_penalty"),
        ({"sampling": SamplingConfig(draft="ngram")}, ConfigError, "draft"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"top": -1}, ConfigError, "at least 0"),
        ({"ids": []}, ConfigError, "at least one token"),
        ({"ids": [10_000]}, ConfigError, "vocabulary"),
        ({"ids": [5] * 2048}, DataError, "leaves no room"),
    ],
)
def test_what_cannot_join_is_refused(options: dict[str, Any], error: type[Exception], problem: str) -> None:
    with Engine(made("tiny")).open() as batch:
        with pytest.raises(error, match=problem):
            batch.join(options.pop("ids", LONG), **{"seed": 0, **options})
        assert not len(batch) and batch.step() == []


def test_what_cannot_be_opened_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes no draft"):
        Engine(made("tiny")).open(SamplingConfig(draft="ngram"))
    from rlhf_core.generation.drafting import Drafts

    with pytest.raises(ConfigError, match="takes no draft"):
        Engine(made("tiny"), drafts=Drafts(NgramDrafter())).open()


@pytest.fixture(scope="module")
def tiny() -> PolicyModel:
    return made("tiny")


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_order_of_joining_leaving_and_stepping(tiny: PolicyModel, data: st.DataObject) -> None:
    memory = data.draw(st.sampled_from([None, 6 * 64 * 2 * 2 * 2 * 16 * 4]), label="memory")
    joined: dict[int, tuple[list[int], SamplingConfig]] = {}
    found: dict[int, Completion] = {}
    gone: set[int] = set()
    with Engine(tiny, memory=memory).open() as batch:
        for _ in range(data.draw(st.integers(1, 12), label="events")):
            event = data.draw(st.sampled_from(["join", "join", "step", "leave"]))
            if event == "join":
                ids, sampling = data.draw(st.sampled_from(PROMPTS)), data.draw(st.sampled_from(OPTIONS))
                joined[batch.join(ids, seed=len(joined), sampling=sampling)] = (ids, sampling)
            elif event == "step":
                finish(batch, found, steps=data.draw(st.integers(1, 5)))
            elif joined:
                number = data.draw(st.sampled_from(sorted(joined)))
                batch.leave(number)
                gone |= {number} - found.keys()
        finish(batch, found)
    assert found.keys() == joined.keys() - gone
    for number, completion in found.items():
        assert_same(completion, alone(tiny, joined[number][0], number, joined[number][1]))
