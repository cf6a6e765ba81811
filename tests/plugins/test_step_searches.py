"""Searches over steps: the contract of samplers, whose paths survive, no prefix read twice, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from rlhf_plugins.rewards.process_reward import ProcessRewardReward
from rlhf_plugins.samplers.beam import BeamConfig, BeamSampler
from rlhf_plugins.samplers.dvts import DVTSConfig, DVTSSampler
from rlhf_plugins.samplers.particles import (
    ParticlesConfig,
    ParticlesSampler,
    resampling_weights,
    systematic_indices,
)

from rlhf_core.contracts.reward import Sample
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.step_trees import AGGREGATED, SearchStep, StepSearchConfig, StepTrees, distinct_first
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel, ProcessRewardModel
from rlhf_core.rewards import open_rewards
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.kit_rewards import DigitReward
from rlhf_core.testing.tiny import tiny_policy

SMALL = {"max_new_tokens": 9, "max_step_tokens": 3}


@functools.cache
def shared_policy() -> PolicyModel:
    """The policy of all checks of the contract: measured once, for the many searches of small trees."""
    return tiny_policy(0)


class StepSearchContract(SamplerContract):
    """The contract on one policy."""

    def models(self) -> dict[str, Any]:
        self.reward = DigitReward()
        return {"policy": shared_policy(), "process_reward": self.reward}


class TestBeam(StepSearchContract):
    method = "beam"
    options: ClassVar = {**SMALL, "beams": 2, "expansions": 2}
    no_effect = ("separator", "tree")  # the tiny model hardly ever draws a text of several characters


class TestDVTS(StepSearchContract):
    method = "dvts"
    options: ClassVar = {**SMALL, "subtrees": 2, "expansions": 2}
    no_effect = ("separator", "tree")  # the tiny model hardly ever draws a text of several characters


class TestParticles(StepSearchContract):
    method = "particles"
    options: ClassVar = {**SMALL, "particles": 4}
    no_effect = ("separator", "tree")  # the tiny model hardly ever draws a text of several characters


def process_reward() -> ProcessRewardReward:
    return ProcessRewardReward.of(ProcessRewardModel.adopt(tiny_policy(3), seed=1))


def trees_of(reward: Any, prompts: Sequence[str] = ("17+25=?",), **options: Any) -> StepTrees:
    policy = tiny_policy()
    config = StepSearchConfig(**{"max_new_tokens": 12, "max_step_tokens": 4, **options})
    return StepTrees(Engine(policy, seed=5), prompt_batch(policy, prompts), open_rewards(reward), config)


def grown(trees: StepTrees, depth: int = 3, width: int = 2) -> list[SearchStep]:
    """Grow every open step of every tree `width` times, `depth` times over; return the last generation."""
    heads = trees.roots
    for _ in range(depth):
        heads = trees.grow([head for head in heads if not head.ended for _ in range(width)])
    return heads


def test_scores_of_a_path_are_those_of_the_whole_completion() -> None:
    reward = process_reward()
    trees = trees_of(reward, separator="\n")
    for step in grown(trees):
        if step.stop_reason == "end":
            sample = Sample("17+25=?", step.text, completion_ids=step.ids, stop_reason="end")
            # Steps that their limit cut off are none of the whole: only the last score is.
            assert step.step_scores[-1] == pytest.approx(reward.score_steps([sample])[0][-1], abs=1e-6)


def test_a_process_reward_reads_each_token_of_a_tree_once() -> None:
    trees = trees_of(process_reward(), ["17+25=?", "3*4=?"])
    before = trees.reader.forwarded
    grown(trees)
    assert trees.reader.forwarded - before == sum(trees.tokens)
    assert trees.tokens == [sum(len(step.own.ids) for step in steps) for steps in trees.steps]


def test_the_policy_forwards_each_token_of_a_tree_once() -> None:
    trees = trees_of(DigitReward(), ["17+25=?", "3*4=?"])
    grown(trees, depth=3, width=3)
    # A prompt's last token is forwarded with each of its children, as the last token of any step is.
    assert trees.engine.forwarded == sum(map(trees.forwarded, range(2)))
    prompts = [len(one.handle.ids) for one in trees.roots if one.handle is not None]
    assert trees.engine.forwarded == sum(prompts) - 2 + sum(trees.tokens)


def test_a_sampler_counts_what_both_models_forward() -> None:
    sampler = BeamSampler(BeamConfig(**SMALL, beams=2), policy=tiny_policy(), process_reward=process_reward())
    (found,) = sampler.sample(["17+25=?"], 2, seed=1)
    assert sampler.forwarded["policy"] == found[0].details["tokens_forwarded"]
    assert sampler.forwarded["process_reward"] > sampler.forwarded["policy"]
    assert found[0].details["step_scores"][-1] == found[0].score


def test_a_path_has_the_log_probabilities_of_one_forward_pass() -> None:
    policy = tiny_policy()
    trees = trees_of(DigitReward())
    step = max(grown(trees), key=lambda one: len(one.ids))
    made = trees.completion(step)
    engine = Engine(policy)
    (prompt,) = engine.prefill([trees.roots[0].handle.ids])  # type: ignore[union-attr]
    (wanted,) = engine.score([prompt], [made.ids])
    assert made.raw_logprobs == pytest.approx(wanted.tolist(), abs=1e-5)
    assert len(made.ids) == sum(len(one.own.ids) for one in step.path)


def test_limits_are_those_of_the_whole_path() -> None:
    trees = trees_of(DigitReward(), max_new_tokens=6, min_new_tokens=3)
    heads = grown(trees, depth=2, width=4)
    assert all(one.ended for one in heads)
    assert all(3 <= len(one.ids) <= 6 for one in heads)


def test_a_separator_ends_a_step_and_a_stop_string_the_path() -> None:
    trees = trees_of(DigitReward(), separator="a", max_step_tokens=200, max_new_tokens=200, stop=["e"])
    steps = trees.grow([trees.roots[0]] * 60)
    open_steps = [one for one in steps if not one.ended]
    assert open_steps
    decode = trees.engine.policy.tokenizer.decode
    assert all("a" in one.text and "a" not in decode(one.ids[:-1]) for one in open_steps)
    stopped = [one for one in steps if one.stop_reason == "stop"]
    assert all("e" not in one.text for one in steps)
    assert stopped


def test_paths_are_scored_by_the_named_aggregation() -> None:
    scores = (0.5, 0.25, 1.0)
    assert {name: function(scores) for name, function in AGGREGATED.items()} == {
        "last": 1.0, "min": 0.25, "mean": pytest.approx(1.75 / 3), "product": 0.125,
    }  # fmt: skip


def test_the_best_are_chosen_and_repeated_paths_only_where_others_lack() -> None:
    trees = trees_of(DigitReward())
    one, other, third = trees.grow([trees.roots[0]] * 3)
    one.ids, other.ids, third.ids = (1,), (1,), (2,)
    one.score, other.score, third.score = 2.0, 2.0, 1.0
    assert distinct_first([one, other, third], 2) == [one, third]
    assert distinct_first([one, other, third], 3) == [one, other, third]


def test_a_released_or_ended_step_gets_no_child() -> None:
    trees = trees_of(DigitReward())
    trees.close()
    with pytest.raises(ValueError, match="released"):
        trees.grow(trees.roots)


def test_a_wide_beam_finds_at_least_what_a_narrow_search_finds() -> None:
    options = {**SMALL, "max_new_tokens": 12}
    worth = []
    for width in (1, 6):
        sampler = BeamSampler(
            BeamConfig(beams=width, expansions=width, **options), policy=tiny_policy(), process_reward=DigitReward()
        )
        found = sampler.sample([f"{at}+2=?" for at in range(4)], seed=1)
        worth.append(sum(group[0].score or 0.0 for group in found))
    assert worth[1] > worth[0]


def test_dvts_follows_the_best_step_of_each_subtree_alone() -> None:
    policy = tiny_policy()
    config = DVTSConfig(**SMALL, subtrees=3, expansions=2)
    trees = StepTrees(Engine(policy, seed=5), prompt_batch(policy, ["1+2=?"]), open_rewards(DigitReward()), config)
    (found,) = DVTSSampler(config, policy=policy, process_reward=DigitReward()).search(trees, 3)
    firsts = trees.roots[0].children
    assert len(firsts) == 6
    best = [max(firsts[at : at + 2], key=lambda one: one.score) for at in (0, 2, 4)]
    assert {one.path[0] for one in found} == set(best)
    for one in found:
        for step in one.path[1:]:
            assert step.parent is not None
            assert step.score == max(each.score for each in step.parent.children)


def test_resampling_weights_and_indices_by_hand() -> None:
    assert resampling_weights([0.0, 0.0], 1.0) == [0.5, 0.5]
    # e^(ln 3 / 1) = 3 to 1
    assert resampling_weights([1.0986122886681098, 0.0], 1.0) == pytest.approx([0.75, 0.25])
    assert systematic_indices([0.75, 0.25], 0.4) == [0, 0]  # points 0.2 and 0.7
    assert systematic_indices([0.75, 0.25], 0.6) == [0, 1]  # points 0.3 and 0.8
    assert systematic_indices([0.0, 1.0, 0.0], 0.0) == [1, 1, 1]


def test_particles_move_to_larger_scores_as_the_temperature_falls() -> None:
    worth = []
    for temperature in (1000.0, 0.1):
        config = ParticlesConfig(**SMALL, particles=8, resampling_temperature=temperature)
        sampler = ParticlesSampler(config, policy=tiny_policy(), process_reward=DigitReward())
        found = sampler.sample([f"{at}+2=?" for at in range(4)], 8, seed=1)
        worth.append(sum(one.score or 0.0 for group in found for one in group))
    assert worth[1] > worth[0]


@pytest.mark.parametrize("sampler", [BeamSampler, DVTSSampler, ParticlesSampler])
def test_a_reward_without_step_scores_is_refused_as_the_sampler_is_made(sampler: Any) -> None:
    with pytest.raises(ConfigError, match=r"process_reward=….*needs a reward that scores steps"):
        sampler(policy=tiny_policy(), process_reward="repetition")


def test_another_separator_than_the_process_rewards_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained with another separator"):
        trees_of(process_reward(), separator=";")


@pytest.mark.parametrize("n", [0, True, 1.5])
def test_a_number_of_completions_below_one_is_refused(n: Any) -> None:
    with pytest.raises(ConfigError, match="n must be a whole number, at least 1"):
        BeamSampler(policy=tiny_policy(), process_reward=DigitReward()).sample(["1"], n)
