"""`mcts`: the contract of samplers, PUCT, backups and widening by hand, values of unvisited steps, limits, and the tree."""

from __future__ import annotations

import functools
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from rlhf_plugins.rewards.process_reward import ProcessRewardReward
from rlhf_plugins.samplers.mcts import MCTSConfig, MCTSGenerator, allowed_children, policy_priors, puct

from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel, ProcessRewardModel
from rlhf_core.plugin import tree_svg
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.kit_rewards import DigitReward
from rlhf_core.testing.tiny import tiny_policy

SMALL: dict[str, Any] = {"max_new_tokens": 9, "max_step_tokens": 3, "simulations": 10}
DEEP = SMALL | {"simulations": 20, "widening": 1.5, "widening_exponent": 0.5, "max_step_tokens": 2}


@functools.cache
def shared_policy() -> PolicyModel:
    """The policy of all checks of the contract: measured once, for the many searches of small trees."""
    return tiny_policy(0)


class TestByProcessReward(SamplerContract):
    method = "mcts"
    options: ClassVar = {**DEEP, "leaves": 4}
    # The tiny model hardly ever draws a text of several characters; limits are tested below; the rest is for rollouts.
    no_effect = ("separator", "tree", "max_seconds", "max_tokens", "values", "rollouts")

    def models(self) -> dict[str, Any]:
        self.reward = DigitReward()
        return {"policy": shared_policy(), "process_reward": self.reward}


class TestByRollouts(SamplerContract):
    method = "mcts"
    options: ClassVar = {**SMALL, "simulations": 6, "values": "rollouts", "prior": "uniform"}
    no_effect = tuple(name for name in MCTSConfig.model_fields if name != "rollouts")  # the others are tried above

    def models(self) -> dict[str, Any]:
        self.reward = DigitReward()
        return {"policy": shared_policy(), "reward": self.reward}


def sampler(reward: Any = None, **options: Any) -> MCTSGenerator:
    config = MCTSConfig(**{**SMALL, **options})
    return MCTSGenerator(config, policy=tiny_policy(), process_reward=reward or DigitReward())


def tree_of(reward: Any = None, **options: Any) -> dict[str, Any]:
    (found,) = sampler(reward, **options).sample(["17+25=?"], seed=3)
    return found[0].details["tree"]


def test_puct_by_hand() -> None:
    # 0.5 + 2 · 0.25 · √9 / (1 + 2) = 1
    assert puct(0.5, 2, 0.25, 9, 2.0) == pytest.approx(1.0)
    assert puct(0.5, 0, 0.25, 0, 2.0) == 0.5
    assert puct(0.7, 5, 0.9, 100, 0.0) == 0.7


def test_widening_by_hand() -> None:
    assert [allowed_children(visits, 2.0, 0.5) for visits in (0, 1, 2, 4, 9, 16)] == [2, 2, 3, 4, 6, 8]
    assert [allowed_children(visits, 0.1, 1.0) for visits in (0, 10, 21)] == [1, 1, 3]


def test_priors_are_the_policys_shares() -> None:
    assert policy_priors([math.log(0.3), math.log(0.1)], 1.0) == pytest.approx([0.75, 0.25])
    assert policy_priors([math.log(0.09), math.log(0.01)], 2.0) == pytest.approx([0.75, 0.25])
    assert policy_priors([-5000.0, -5000.0], 1.0) == [0.5, 0.5]


def own_values(tree: dict[str, Any]) -> dict[int, list[float]]:
    """Return for each step the scores of the visited steps at or below it, itself counted once; the root's leave itself out."""
    steps = {one["number"]: one for one in tree["steps"]}
    below: dict[int, list[float]] = {number: [] for number in steps}
    for one in steps.values():
        at = one
        while one["parent"] is not None and one.get("visits"):
            below[at["number"]].append(one["score"])
            if at["parent"] is None:
                break
            at = steps[at["parent"]]
    return below


@pytest.mark.parametrize("backup", ["mean", "max"])
def test_values_are_the_mean_or_the_largest_of_what_was_found_below(backup: str) -> None:
    # With one token a step and few simulations no end is visited twice, so each visit is a step of its own.
    tree = tree_of(backup=backup, simulations=6, max_new_tokens=30, leaves=1)
    scores, steps = own_values(tree), {one["number"]: one for one in tree["steps"]}
    visited = [one for one in steps.values() if one.get("visits") and one["stop_reason"] is None]
    assert steps[0]["visits"] == 6
    for one in visited:
        below = scores[one["number"]]
        if one["visits"] == len(below):
            wanted = max(below) if backup == "max" else sum(below) / len(below)
            assert one["value"] == pytest.approx(wanted)
    assert any(one["visits"] == len(scores[one["number"]]) > 1 for one in visited)


def test_no_step_is_valued_at_zero_before_its_first_value() -> None:
    # All scores are far below 0: were unvisited steps worth 0, each would look better than all visited ones.
    class Low(DigitReward):
        def score_steps(self, samples: Sequence[Any]) -> list[list[float]]:
            return [[score - 1000 for score in steps] for steps in super().score_steps(samples)]

    def plain(tree: dict[str, Any]) -> list[Any]:
        return [(one["parent"], one["text"], one.get("visits")) for one in tree["steps"]]

    low, high = tree_of(Low(), simulations=24), tree_of(simulations=24)
    assert plain(low) == plain(high)
    assert all(one["value"] < -900 for one in low["steps"] if one.get("visits"))


def test_visits_add_up_and_virtual_losses_are_taken_back() -> None:
    for leaves in (1, 5):
        tree = tree_of(leaves=leaves, simulations=20)
        steps = {one["number"]: one for one in tree["steps"]}
        assert steps[0]["visits"] == 20
        for number, one in steps.items():
            below = sum(each.get("visits", 0) for each in steps.values() if each["parent"] == number)
            if one.get("visits") and one["stop_reason"] is None:
                assert one["visits"] >= below
        priors = [one["prior"] for one in steps.values() if one["parent"] == 0 and "prior" in one]
        assert sum(priors) == pytest.approx(1)


def test_no_token_of_the_tree_is_forwarded_twice_by_either_model() -> None:
    reward = ProcessRewardReward.of(ProcessRewardModel.adopt(tiny_policy(3), seed=1))
    one = sampler(reward, simulations=16)
    (found,) = one.sample(["17+25=?"], seed=3)
    tokens = sum(step["tokens"] for step in found[0].details["tree"]["steps"])
    prompt = one.forwarded["policy"] - tokens + 1
    assert prompt == len(one.policy.tokenizer("17+25=?")["input_ids"])
    assert found[0].details["tokens_forwarded"] == one.forwarded["policy"]
    assert one.forwarded["process_reward"] == prompt + tokens


def test_more_simulations_find_larger_scores() -> None:
    prompts = [f"{at}+2=?" for at in range(6)]
    worth = [
        sum(group[0].score or 0.0 for group in sampler(simulations=count).sample(prompts, seed=1)) for count in (1, 40)
    ]
    assert worth[1] > worth[0]


def test_limits_end_a_search() -> None:
    few, many = tree_of(simulations=None, max_tokens=12), tree_of(simulations=None, max_tokens=60)
    assert sum(one["tokens"] for one in few["steps"]) < sum(one["tokens"] for one in many["steps"])
    # A round may begin just below the limit, and the best path is drawn to its end behind it.
    assert sum(one["tokens"] for one in many["steps"]) <= 60 + 4 * 3 + 9
    assert len(tree_of(simulations=1)["steps"]) >= 2
    timed = tree_of(simulations=None, max_seconds=0.05)
    assert timed["steps"][0]["visits"] >= 1


def test_a_search_whose_paths_have_all_ended_ends_without_a_limit_on_simulations() -> None:
    tree = tree_of(simulations=None, max_tokens=10_000, max_new_tokens=1, widening=1.0, widening_exponent=0.1)
    assert tree["steps"][0]["visits"] >= 256


def test_the_tree_is_json_and_its_picture_has_a_circle_for_each_step() -> None:
    (found,) = sampler(tree="svg").sample(["17+25=?"], 2, seed=3)
    tree = json.loads(json.dumps(found[0].details["tree"]))
    picture = ElementTree.fromstring(found[0].details["tree_svg"])
    circles = [one for one in picture if one.tag.endswith("circle")]
    lines = [one for one in picture if one.tag.endswith("line")]
    assert len(circles) == len(tree["steps"]) == len(lines) + 1
    assert sum(one.get("stroke-width") == "3" for one in lines) == len(tree["best"])
    assert "".join(tree["steps"][at]["text"] for at in tree["best"]) == found[0].text
    assert tree_svg(tree) == found[0].details["tree_svg"]
    assert "tree" not in found[1].details


def test_markup_in_a_step_is_text_in_the_picture() -> None:
    tree = {
        "steps": [
            {"number": 0, "parent": None, "text": "", "tokens": 0, "score": None, "stop_reason": None},
            {"number": 1, "parent": 0, "text": "<b>&\x00\x1b", "tokens": 1, "score": 0.5, "stop_reason": "end"},
        ],
        "best": [1],
    }
    assert "1: <b>&" in "".join(ElementTree.fromstring(tree_svg(tree)).itertext())


@pytest.mark.parametrize("option", ["simulations", "max_tokens", "max_seconds", "leaves"])
def test_a_limit_of_zero_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        MCTSConfig.parse({option: 0})


def test_a_search_without_a_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="a search needs a limit"):
        MCTSConfig.parse({"simulations": None})


def test_the_reward_of_the_values_is_the_one_that_is_needed() -> None:
    with pytest.raises(ConfigError, match="no model is given for the sampler's role `process_reward`"):
        MCTSGenerator(policy=tiny_policy())
    with pytest.raises(ConfigError, match="no model is given for the sampler's role `reward`"):
        MCTSGenerator(MCTSConfig(values="rollouts"), policy=tiny_policy())
    with pytest.raises(ConfigError, match="scores whole completions"):
        MCTSGenerator(policy=tiny_policy(), process_reward="repetition")
