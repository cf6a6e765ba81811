"""`confidence`: the contract of samplers, and its thresholds, cuts and votes against ones computed from whole completions."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlhf_plugins.samplers.confidence import (
    ConfidenceBasedStopping,
    ConfidenceConfig,
    confidence_threshold,
    lowest_group,
    vote_confidence,
)

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel
from rlhf_core.rewards.answer_votes import answer_key, is_decided
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.tiny import tiny_policy

SHORT: dict[str, Any] = {"max_new_tokens": 8, "confidence_window": 2, "confidence_top": 5}
PROMPTS = ["1+1=?", "2+2=?", "17+25=?", "9-3=?"]


@functools.cache
def shared_policy() -> PolicyModel:
    """One policy, measured once. Frozen, as loaded for sampling: prompts are kept."""
    return tiny_policy().requires_grad_(requires_grad=False)


class TestConfidence(SamplerContract):
    method = "confidence"
    options: ClassVar = {**SHORT, "candidates": 6, "warmup": 3, "keep": 0.6, "round_size": 1, "consensus": 0.6}

    def models(self) -> dict[str, Any]:
        return {"policy": shared_policy()}


def whole_candidates(n: int, seed: int, **options: Any) -> list[list[Completion]]:
    """Return the completions that nothing ends early."""
    policy = shared_policy()
    sampling = SamplingConfig(min_confidence=0, **{**SHORT, **options})
    return Engine(policy, seed=seed).generate(prompt_batch(policy, PROMPTS), n, sampling)


def sample(n: int = 1, seed: int = 3, **options: Any) -> list[list[Completion]]:
    return ConfidenceBasedStopping(ConfidenceConfig(**{**SHORT, **options}), policy=shared_policy()).sample(
        PROMPTS, n, seed=seed
    )


def groups(confidence: Sequence[float], window: int) -> list[float]:
    ends = range(window, len(confidence) + 1) if len(confidence) >= window else [len(confidence)]
    return [float(np.mean(confidence[max(0, end - window) : end])) for end in ends]


def by_hand(group: Sequence[Completion], threshold: float, weight: str) -> tuple[dict[Any, float], list[float], int]:
    """Return the votes of completions that would have been drawn whole, what each counts, and how many were cut off."""
    votes: defaultdict[Any, float] = defaultdict(float)
    counts, stopped = [], 0
    for one in group:
        means = groups(one.confidence, 2)
        count = {
            "mean": float(np.mean(one.confidence)),
            "lowest": min(means),
            "tail": float(np.mean(one.confidence[-2:])),
            "equal": 1.0,
        }[weight]
        key = answer_key(one.text, complete=one.stop_reason != "length")
        if min(means) >= threshold and key is not None:
            votes[key] += count
        counts.append(count)
        first = next((at for at, mean in enumerate(means) if mean < threshold and len(one.ids) > 1), None)
        ended = first is not None and not (first + 2 == len(one.ids) and one.stop_reason == "end")
        stopped += ended
    return dict(votes), counts, stopped


@pytest.mark.parametrize("weight", ["mean", "lowest", "tail", "equal"])
@pytest.mark.parametrize("keep", [0.9, 0.3])
def test_votes_by_brute_force_on_whole_completions(weight: str, keep: float) -> None:
    warmup, most = 5, 14
    options = {"candidates": most, "warmup": warmup, "keep": keep, "weight": weight, "consensus": None}
    found = sample(most, round_size=None, **options)
    cut = 0
    for mine, drawn in zip(found, whole_candidates(most, 3), strict=True):
        lowest = [min(groups(one.confidence, 2)) for one in drawn[:warmup]]
        threshold = float(np.quantile(lowest, 1 - keep)) * (1 - 1e-5)
        about = mine[0].details
        assert about["threshold"] == pytest.approx(threshold, rel=1e-6) and about["candidates"] == most
        # The warm-up is drawn whole; the others end where they fall below.
        warm, later = by_hand(drawn[:warmup], threshold, weight), by_hand(drawn[warmup:], threshold, weight)
        votes = {key: warm[0].get(key, 0) + later[0].get(key, 0) for key in [*warm[0], *later[0]]}
        assert about["stopped"] == later[2]
        cut += later[2]
        if votes:
            winner = max(votes, key=lambda key: votes[key])
            assert about["answer"] == str(winner)
            assert mine[0].score == pytest.approx(votes[winner] / sum(votes.values()), rel=1e-5)
        else:
            assert about["answer"] is None and mine[0].score == 0
        ids = {tuple(one.ids) for one in mine}
        assert {tuple(one.ids) for one in drawn[:warmup]} <= ids
        assert all(any(tuple(one.ids[: len(own)]) == own for one in drawn) for own in ids)
    assert cut > (8 if keep < 0.5 else 0)


@pytest.mark.parametrize("consensus", [None, 0.7])
def test_the_round_in_which_a_vote_ends(consensus: float | None) -> None:
    """Checked after the warm-up and each round against the rule, on a vote replayed from whole completions."""
    warmup, most, size = 3, 13, 2
    options: dict[str, Any] = {"max_new_tokens": 3, "weight": "equal", "keep": 1.0}
    found = sample(1, candidates=most, warmup=warmup, round_size=size, consensus=consensus, **options)
    counts = set()
    for (one,), drawn in zip(found, whole_candidates(most, 3, max_new_tokens=3), strict=True):
        threshold = min(min(groups(each.confidence, 2)) for each in drawn[:warmup]) * (1 - 1e-5)
        keys = [
            answer_key(each.text, complete=each.stop_reason != "length")
            if min(groups(each.confidence, 2)) >= threshold
            else None
            for each in drawn
        ]
        count = warmup
        while count < most:
            cast = [key for key in keys[:count] if key is not None]
            share = max(map(cast.count, cast)) / len(cast) if cast else 0.0
            if (consensus is not None and len(cast) > 1 and share >= consensus) or is_decided(
                keys[:count], most - count
            ):
                break
            count += size
        assert one.details["candidates"] == min(count, most)
        counts.add(count)
    assert min(counts) < most


def test_identical_completions_end_none_of_themselves() -> None:
    """At temperature 0 each completion is the one that set the threshold: rounding doesn't cut it off."""
    for keep in (1.0, 0.9, 0.1):
        for one in sample(8, candidates=8, warmup=3, keep=keep, temperature=0.0, consensus=None, max_new_tokens=7):
            assert one[0].details["stopped"] == 0 and len({tuple(each.ids) for each in one}) == 1


def test_the_least_confidence_holds_in_the_warm_up_too() -> None:
    found = sample(6, candidates=6, warmup=3, keep=1.0, min_confidence=1000, consensus=None)
    for group in found:
        assert max(len(one.ids) for one in group) == 2 and [one.score for one in group] == [0.0] * 6
        ended = sum(one.stop_reason == "end" for one in group)
        assert group[0].details["stopped"] == 6 - ended > 0 and group[0].details["threshold"] == 1000


def test_forwarded_tokens_are_counted() -> None:
    policy = tiny_policy().requires_grad_(requires_grad=False)  # for which no prompt is kept yet
    sampler = ConfidenceBasedStopping(ConfidenceConfig(candidates=9, keep=0.3, round_size=3, **SHORT), policy=policy)
    found = sampler.sample(PROMPTS, seed=0)
    assert sampler.forwarded["policy"] == sum(group[0].details["tokens_forwarded"] for group in found)
    assert sum(group[0].details["stopped"] for group in found) > 0


def test_by_hand() -> None:
    confidence = [4.0, 2.0, 6.0, 1.0, 5.0]
    assert lowest_group(confidence, 2) == 3.0 and lowest_group(confidence, 3) == 3.0
    assert lowest_group(confidence, 5) == lowest_group(confidence, 9) == 3.6 and lowest_group(confidence, 1) == 1.0
    assert [vote_confidence(confidence, 2, weight) for weight in ("mean", "lowest", "tail", "equal")] == [3.6, 3, 3, 1]
    # Four of five are above 8 / 10 of the way from the largest to the smallest: the second smallest.
    assert confidence_threshold([5.0, 1.0, 3.0, 4.0, 2.0], 0.75) == 2.0
    assert confidence_threshold([1.0, 2.0], 0.9) == pytest.approx(1.1) and confidence_threshold([7.0], 0.1) == 7.0
    assert confidence_threshold([1.0, 3.0, 2.0], 1.0) == 1.0


@given(st.lists(st.floats(0, 50), min_size=1, max_size=30), st.integers(1, 40), st.floats(0.01, 1))
def test_against_numpy(confidence: list[float], window: int, keep: float) -> None:
    assert lowest_group(confidence, window) == pytest.approx(min(groups(confidence, window)), abs=1e-9)
    assert confidence_threshold(confidence, keep) == pytest.approx(float(np.quantile(confidence, 1 - keep)), abs=1e-9)
    assert math.isfinite(vote_confidence(confidence, window, "tail"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates.*greater than or equal to 1"),
        ({"warmup": 16}, r"warmup \(16\) leaves none of the 16 `candidates` to end early"),
        ({"keep": 0}, "keep.*greater than 0"),
        ({"keep": 1.5}, "keep.*less than or equal to 1"),
        ({"consensus": 0.5}, "consensus.*greater than 0.5"),
        ({"weight": "bottom"}, "weight"),
        ({"confidence_window": 300}, "no completion of at most 256 tokens"),
        ({"consensus": None, "round_size": 2}, "round_size has no meaning where no vote can end early"),
        ({"round_size": 0}, "round_size.*greater than or equal to 1"),
    ],
)
def test_options_that_cannot_hold(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConfidenceConfig.parse(options)


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="n must be a whole number, at least 1"):
        sample(0)
