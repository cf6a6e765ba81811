"""Speculative decoding: completions are those without a draft, whatever is guessed, and their distribution is the policy's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from architectures import make_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.draft_model import ModelDrafter
from rlhf_core.generation.drafting import Drafter, DraftRow, Drafts, Guesses
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.lookup_drafts import NgramDrafter, SuffixDrafter
from rlhf_core.generation.native import measure_native
from rlhf_core.generation.native_backend import NativeBackend
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["a", "a longer prompt than the others", [{"role": "user", "content": "hi"}], "ab ab ab ab ab ab"]


def sharp(model: Any, factor: float = 2) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(sharp(tiny_model()).requires_grad_(False), tiny_tokenizer())


CONTINUATIONS = 2_000
"""Twenty thousand fit the distribution as well; they take ten times as long."""


class Eager(Drafts):
    """Verifies all that is guessed, whatever it costs."""

    def look(self, rows: int) -> bool:
        return True

    def choose(self, rows: Sequence[DraftRow], sampling: SamplingConfig, *, waiting: bool = False) -> list[list[int]]:
        self._offered = self.propose(rows, self.most, sampling)
        return [guesses.ids for guesses in self._offered]


class Oracle(Drafter):
    """Guesses from known completions, every k-th guess wrong."""

    draws = False

    def __init__(self, known: Sequence[Sequence[int]], wrong_every: int) -> None:
        self.known, self.wrong_every = known, wrong_every

    def begin(self, prompt: Sequence[int]) -> None:
        return None

    def propose(self, rows: Sequence[DraftRow], most: int, sampling: SamplingConfig) -> list[Guesses]:
        found = []
        for row in rows:
            drawn = row.ids[row.prompt_length :]
            same = next((ids for ids in self.known if list(ids[: len(drawn)]) == drawn), [])
            ids = list(same[len(drawn) : len(drawn) + min(most, row.room)])
            ids = [
                (token + 1) % 100 if (len(drawn) + at) % self.wrong_every == 0 else token
                for at, token in enumerate(ids)
            ]
            found.append(Guesses(ids, [0] * len(ids)))
        return found


@functools.cache
def drafter(name: str, policy: PolicyModel) -> Drafter:
    if name == "itself":
        return ModelDrafter(policy, policy)
    if name == "other":
        return ModelDrafter(PolicyModel(sharp(tiny_model(seed=1)), tiny_tokenizer()), policy)
    return NgramDrafter() if name == "ngram" else SuffixDrafter()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3},
        {"min_new_tokens": 20, "stop": ["e"]},
        {"min_confidence": 3.65, "confidence_window": 3},
    ],
    ids=["greedy", "sampled", "nucleus", "penalty", "stop", "confidence"],
)
@pytest.mark.parametrize("name", ["itself", "other", "ngram", "suffix"])
def test_completions_are_those_without_a_draft(policy: PolicyModel, name: str, options: dict[str, Any]) -> None:
    sampling = SamplingConfig(**{"max_new_tokens": 40, **options})
    batch = prompt_batch(policy, PROMPTS)
    plain = Engine(policy, seed=1).generate(batch, 3, sampling)
    drafts = Eager(drafter(name, policy), most=5)
    for _ in range(1 if name in ("itself", "other") else 2):  # in the second, a look-up knows the first
        found = Engine(policy, seed=1, drafts=drafts).generate(batch, 3, sampling)
        for one, other in zip(itertools.chain(*plain), itertools.chain(*found), strict=True):
            assert (list(one.ids), one.text, one.stop_reason) == (list(other.ids), other.text, other.stop_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
            assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=2e-5)
            assert one.kept_mass == pytest.approx(other.kept_mass, abs=2e-5)
            assert one.confidence == pytest.approx(other.confidence, abs=2e-5)
    counts = drafts.counts
    assert counts.accepted > 0 or name in ("other", "ngram")  # of random texts only the same ones are guessed
    if name == "itself" and not options.keys() & {"repetition_penalty", "min_new_tokens", "min_confidence"}:
        # The same model drawing with the same numbers is always right: six tokens in a pass.
        assert counts.accepted == counts.guessed
        assert counts.passes <= sum(-(-len(one.ids) // 6) + 1 for one in itertools.chain(*plain))


@pytest.mark.parametrize("wrong_every", [1, 2, 3, 7])
@pytest.mark.parametrize("memory", [None, 14])
def test_wrong_guesses_leave_no_trace(policy: PolicyModel, wrong_every: int, memory: int | None) -> None:
    """Keys and values of guesses that were wrong are given up, with little memory and rows that come back, too."""
    sampling = SamplingConfig(max_new_tokens=150, min_new_tokens=100, top_k=8)
    batch = prompt_batch(policy, PROMPTS)
    plain = Engine(policy, seed=1).generate(batch, 2, sampling)
    known = [one.ids for group in plain for one in group]
    drafts = Eager(Oracle(known, wrong_every), most=4)
    bytes_per_block = 64 * 4 * policy.measured(measure_native).elements
    engine = Engine(policy, seed=1, drafts=drafts, memory=None if memory is None else memory * bytes_per_block)
    found = engine.generate(batch, 2, sampling)
    assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in plain]
    counts = drafts.counts
    assert counts.tokens == sum(map(len, known))
    assert (counts.accepted == 0) == (wrong_every == 1)
    cache = engine.backend._native.cache  # type: ignore[attr-defined]
    assert cache.num_sequences == len(engine.backend._native.prefixes)  # type: ignore[attr-defined]
    # Where every k-th guess is wrong, a pass draws up to it and what comes in its place.
    assert wrong_every > 4 or counts.passes >= counts.tokens // max(2, wrong_every + 1)


def test_any_guesses_at_any_time(policy: PolicyModel) -> None:
    """Rows with and without guesses in one pass, of any length; as it is decided by what passes cost, it must not matter."""
    sampling = SamplingConfig(max_new_tokens=60, temperature=0.9, top_k=8)
    batch = prompt_batch(policy, PROMPTS)
    plain = Engine(policy, seed=3).generate(batch, 4, sampling)
    random = np.random.default_rng(0)

    class Sometimes(Drafts):
        def choose(
            self, rows: Sequence[DraftRow], sampling: SamplingConfig, *, waiting: bool = False
        ) -> list[list[int]]:
            self._offered = self.propose(rows, 8, sampling)
            return [one.ids[: random.integers(0, 9)] if random.random() < 0.6 else [] for one in self._offered]

    drafts = Sometimes(Oracle([one.ids for group in plain for one in group], 5))
    found = Engine(policy, seed=3, most_rows=7, drafts=drafts).generate(batch, 4, sampling)
    assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in plain]
    assert 0 < drafts.counts.accepted < drafts.counts.guessed


def test_a_sequence_is_extended_with_a_draft(policy: PolicyModel) -> None:
    sampling = SamplingConfig(max_new_tokens=30, top_k=8)
    prompt = list(range(10, 30))
    kept = []
    for drafts in (None, Eager(NgramDrafter(), most=6)):
        engine = Engine(policy, drafts=drafts)
        (handle,) = engine.prefill([prompt])
        (first,) = engine.extend([handle], sampling, seeds=[5], limits=[11])
        (second,) = engine.extend([first.handle], sampling, seeds=[5])
        kept.append((first.completion.ids, second.completion.ids, second.handle.cached))
    assert kept[0][:2] == kept[1][:2]
    assert kept[1][2] is not None and kept[1][2].length == len(prompt) + 11 + len(kept[1][1]) - 1


def test_rows_with_a_rule_are_drawn_token_by_token(policy: PolicyModel) -> None:
    drafts = Eager(drafter("itself", policy), most=6)
    engine = Engine(policy, drafts=drafts)
    (handle,) = engine.prefill([[10, 11, 12]])
    (found,) = engine.extend([handle], SamplingConfig(max_new_tokens=30), seeds=[1], rule=lambda ids: len(ids) == 7)
    assert len(found.completion.ids) == 7 and drafts.counts.guessed == 0


def tiny_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer of seven words and an end token, which has the id of the tiny model's."""
    words = {word: number for number, word in enumerate(["a", "b", "<end>", "c", "d", "e", "f", "g"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def chances(policy: PolicyModel, ids: list[int], length: int, temperature: float, top_p: float) -> dict[Any, float]:
    """Return the probability of each continuation of some length, or that ends before, by the definition."""
    if not length:
        return {(): 1.0}
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([ids])).logits[0, -1]
    probabilities = torch.softmax(logits / temperature, dim=-1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept = probabilities.where(torch.zeros(8).bool().index_fill(0, order[before < top_p], True), 0)
    kept = kept / kept.sum()
    found = {}
    for token in kept.nonzero()[:, 0].tolist():
        rest = {(): 1.0} if token == 2 else chances(policy, [*ids, token], length - 1, temperature, top_p)
        found.update({(token, *ids_behind): float(kept[token]) * share for ids_behind, share in rest.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.4, 0.8)])
@pytest.mark.parametrize("most_rows", [1, 8])
def test_completions_follow_the_policys_distribution(most_rows: int, temperature: float, top_p: float) -> None:
    """Continuations of three tokens against their probabilities, by a chi-square test."""
    policy, draft, other = (
        PolicyModel(sharp(tiny_model(seed, vocab_size=8, layers=1, hidden=16, heads=2, kv_heads=1), 3), tiny_words())
        for seed in (0, 0, 1)
    )
    with torch.no_grad():
        for own, its in zip(draft.parameters(), other.parameters(), strict=True):
            own.lerp_(its, 0.2)
    count = CONTINUATIONS
    sampling = SamplingConfig(max_new_tokens=3, temperature=temperature, top_p=top_p)
    drafts = Eager(ModelDrafter(draft, policy), most=2)
    engine = Engine(policy, seed=11, most_rows=most_rows, drafts=drafts)
    (drawn,) = engine.generate(prompt_batch(policy, ["a b"]), count, sampling)
    assert 0.05 < drafts.counts.accepted / drafts.counts.guessed < 0.95
    expected = chances(policy, [0, 1], 3, temperature, top_p)
    seen = Counter(tuple(one.ids) for one in drawn)
    assert seen.keys() <= expected.keys()
    rare = {ids for ids, share in expected.items() if share * count < 8}
    cells = [(seen[ids], share * count) for ids, share in expected.items() if ids not in rare]
    cells.append((sum(seen[ids] for ids in rare), max(1e-9, sum(expected[ids] for ids in rare) * count)))
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells if wanted > 1)
    freedom = len(cells) - 1
    # The normal approximation of Wilson and Hilferty; seeds are fixed, so the test always gives the same answer.
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(normal) < 3, (statistic, freedom)


def test_a_draft_with_another_vocabulary_is_refused(policy: PolicyModel) -> None:
    other = PolicyModel(tiny_model(vocab_size=8), tiny_words())
    with pytest.raises(ModelError, match=r"`draft_model` has another vocabulary.*same tokenizer"):
        ModelDrafter(other, policy)


def test_a_backend_that_takes_no_drafts_refuses_them(policy: PolicyModel) -> None:
    class Other(NativeBackend):
        name = "other"
        capabilities = dataclasses.replace(NativeBackend.capabilities, drafts=False)

    with pytest.raises(ConfigError, match="can't verify drafts"):
        Engine(policy, backend=Other(policy, memory=None, most_rows=1), drafts=Drafts(NgramDrafter()))


def test_a_model_without_the_fast_loop_says_that_no_draft_is_used(caplog: pytest.LogCaptureFixture) -> None:
    policy = PolicyModel(make_tiny("mamba"), tiny_tokenizer())
    batch, sampling = prompt_batch(policy, ["a"]), SamplingConfig(max_new_tokens=6)
    plain = Engine(policy, seed=1).generate(batch, 1, sampling)
    with caplog.at_level("INFO"):
        found = [Engine(policy, seed=1).generate(batch, 1, sampling.updated(draft="ngram")) for _ in range(2)]
    assert [one[0][0].ids for one in found] == [plain[0][0].ids] * 2
    assert caplog.text.count("no draft is used") == 1
