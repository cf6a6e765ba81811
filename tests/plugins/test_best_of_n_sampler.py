"""`best_of_n`: the contract of samplers, and its choice against one written out on the same candidates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from rlhf_plugins.samplers.best_of_n import BestOfNConfig, BestOfNSampler
from rlhf_plugins.samplers.candidate_choice import vote_weights

from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.rewards.answer_votes import answer_key
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.tiny import tiny_policy

SHORT: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
PROMPTS = ["1+1=?", "2+2=?", "17+25=?", "9-3=?"]


class TestBestOfN(SamplerContract):
    method = "best_of_n"
    options: ClassVar = {**SHORT, "candidates": 5}
    no_effect = ("choose", "vote_weight", "round_size")  # the kit's rewards may be below 0, which votes refuse


class TestWeightedVote(SamplerContract):
    method = "best_of_n"
    options: ClassVar = {**SHORT, "candidates": 5, "choose": "weighted", "vote_weight": "sigmoid"}
    no_effect = ("choose", "vote_weight", "round_size")


class TestMajority(SamplerContract):
    method = "best_of_n"
    options: ClassVar = {**SHORT, "candidates": 9, "choose": "majority", "round_size": 3}


def last_digit(completions: Sequence[str], **columns: Any) -> list[float]:
    """A number from 0 to 1 for each text, so that no two kinds of text are alike."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def candidates(n: int, seed: int, **options: Any) -> list[list[Completion]]:
    policy = tiny_policy()
    return Engine(policy, seed=seed).generate(prompt_batch(policy, PROMPTS), n, BestOfNConfig(**{**SHORT, **options}))


def sample(n: int = 1, seed: int = 3, **options: Any) -> list[list[Completion]]:
    models = {} if options.get("choose") == "majority" else {"reward": last_digit}
    return BestOfNSampler(BestOfNConfig(**{**SHORT, **options}), policy=tiny_policy(), **models).sample(
        PROMPTS, n, seed=seed
    )


def test_the_highest_rewards_of_the_same_candidates() -> None:
    for found, drawn in zip(sample(3, candidates=12), candidates(12, 3), strict=True):
        rewards = last_digit([one.text for one in drawn])
        order = sorted(range(12), key=lambda at: (-rewards[at], at))[:3]
        assert [one.ids for one in found] == [drawn[at].ids for at in order]
        assert [one.score for one in found] == pytest.approx([rewards[at] for at in order])


@pytest.mark.parametrize("choose", ["weighted", "majority"])
def test_votes_by_brute_force_on_the_same_candidates(choose: str) -> None:
    for found, drawn in zip(sample(choose=choose, candidates=16), candidates(16, 3), strict=True):
        rewards = last_digit([one.text for one in drawn])
        totals: defaultdict[Any, float] = defaultdict(float)
        for one, reward in zip(drawn, rewards, strict=True):
            key = answer_key(one.text, complete=one.stop_reason != "length")
            if key is not None:
                totals[key] += reward if choose == "weighted" else 1.0
        (chosen,) = found
        if not totals:
            assert chosen.score == 0 and chosen.details["answer"] is None
            continue
        key = answer_key(chosen.text, complete=chosen.stop_reason != "length")
        assert totals[key] == pytest.approx(max(totals.values()))
        assert chosen.score == pytest.approx(max(totals.values()) / sum(totals.values()))
        assert chosen.details["answer"] == str(key)


@pytest.mark.parametrize("round_size", [1, 2, 5])
def test_a_vote_that_ends_early_has_the_winner_of_the_whole_one(round_size: int) -> None:
    """Candidates are the same, whatever the rounds: so a prompt's answer is, and some aren't drawn."""
    options = {"choose": "majority", "candidates": 11, "max_new_tokens": 3}
    whole, early = sample(**options), sample(round_size=round_size, **options)
    for one, other in zip(whole, early, strict=True):
        assert one[0].details["answer"] == other[0].details["answer"]
        assert other[0].details["candidates"] <= one[0].details["candidates"] == 11


def test_an_early_end_saves_tokens_that_are_counted() -> None:
    policy = tiny_policy().requires_grad_(requires_grad=False)  # as loaded for sampling: prompts are kept
    options = {**SHORT, "choose": "majority", "candidates": 9, "temperature": 0.0}
    spent = []
    for more in ({}, {"round_size": 1}):
        sampler = BestOfNSampler(BestOfNConfig(**options, **more), policy=policy)
        found = sampler.sample(PROMPTS, seed=0)
        spent.append(sampler.forwarded["policy"])
        counted = sum(group[0].details["tokens_forwarded"] for group in found)
        prompts = int(prompt_batch(policy, PROMPTS).prompt_lengths.sum()) - len(PROMPTS)
        # A second sampler finds the prompts of the first; what one prompt needs is counted by itself.
        assert spent[-1] == counted - (prompts if more else 0)
    assert spent[1] < spent[0]


def test_weights_of_votes() -> None:
    assert vote_weights([0.0, 2.0], "reward") == [0.0, 2.0]
    assert vote_weights([0.0, math.log(3), -1000.0], "sigmoid") == pytest.approx([0.5, 0.75, 0.0])
    with pytest.raises(
        ConfigError, match=r"a weighted vote needs rewards of at least 0; got -2; fix: `vote_weight: sig"
    ):
        vote_weights([1.0, -2.0], "reward")


def test_roles_follow_from_the_options() -> None:
    policy = tiny_policy()
    with pytest.raises(ConfigError, match=r"no model is given for the sampler's role `reward`"):
        BestOfNSampler(BestOfNConfig(), policy=policy)
    with pytest.raises(ConfigError, match=r"doesn't use its role `reward` with these options; fix: leave it out"):
        BestOfNSampler(BestOfNConfig(choose="majority"), policy=policy, reward=last_digit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates.*greater than or equal to 1"),
        ({"round_size": 2}, "round_size has no meaning with choose reward"),
        ({"vote_weight": "sigmoid"}, "vote_weight has no meaning with choose reward"),
        ({"choose": "majorty"}, "choose"),
    ],
)
def test_options_that_cannot_hold(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BestOfNConfig.parse(options)


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="n must be a whole number, at least 1"):
        sample(0)
