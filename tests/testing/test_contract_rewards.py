"""The contract of rewards: sound ones fulfil it, and each fault is caught by its check alone."""

from __future__ import annotations

from typing import ClassVar

import pytest
import reward_plugins as rewards
from planted_faults import assert_caught, assert_every_check_can_fail, contract_of

from rlhf_core.testing import RewardContract


class TestExact(RewardContract):
    reward = rewards.Exact


class TestLength(RewardContract):
    reward = rewards.Length


class TestLowest(RewardContract):
    reward = rewards.Lowest


class TestScaled(RewardContract):
    reward = rewards.Scaled
    changes: ClassVar = {"scale": 2.0}


class TestOfGroup(RewardContract):
    reward = rewards.OfGroup


class TestFunction(RewardContract):
    reward = rewards.length
    options: ClassVar = {"scale": 3}
    changes: ClassVar = {"scale": 2.0}


FAULTS: dict[type, dict[str, str]] = {
    rewards.OneScore: {"test_one_finite_float_per_sample": "`score` returns 1 scores for 8 samples"},
    rewards.NoScore: {"test_one_finite_float_per_sample": "must return finite floats; it returns for sample .*: None"},
    rewards.Unordered: {
        "test_scores_follow_the_order_of_samples": "with the samples in another order: sample . scores",
        "test_scores_do_not_depend_on_other_samples": "with 1 prompts at a time: sample . scores",
    },
    rewards.Relative: {"test_scores_do_not_depend_on_other_samples": "with 1 prompts at a time: sample . scores"},
    rewards.Loose: {
        "test_steps_are_finite_floats": "with the samples in another order, steps of sample .: sample 0 scores"
    },
    rewards.Numbered: {"test_group_numbers_mean_nothing": "with other group numbers: sample 0 scores"},
    rewards.Fussy: {"test_any_completion_has_a_score": r"completions that are truncated get the scores \[nan"},
    rewards.PerWord: {"test_any_completion_has_a_score": "ZeroDivisionError"},
    rewards.Masked: {"test_any_completion_has_a_score": "TypeError"},
    rewards.Unscaled: {"test_options_change_scores": "option `scale: 2.0` changes no score"},
    rewards.Dated: {"test_what_it_describes_is_recorded": "`describe` of a new instance differs"},
    rewards.Opaque: {"test_what_it_describes_is_recorded": "`describe` returns values that can't be written as JSON"},
    rewards.Noisy: {"test_the_same_samples_score_the_same": "get other scores the second time"},
    rewards.Writes: {"test_samples_do_not_change": "scoring changes sample 0"},
    rewards.BadSteps: {"test_steps_are_finite_floats": "step scores that aren't finite floats for sample 0"},
}


@pytest.mark.parametrize("plugin", FAULTS, ids=lambda plugin: plugin.__name__)
def test_a_fault_is_caught_by_its_check_alone(plugin: type[rewards.Length]) -> None:
    changes = {"scale": 2.0} if plugin.Config is rewards.ScaledConfig else {}
    assert_caught(contract_of(RewardContract, plugin, changes=changes), FAULTS[plugin])


def test_every_check_can_fail() -> None:
    assert_every_check_can_fail(RewardContract, FAULTS)
