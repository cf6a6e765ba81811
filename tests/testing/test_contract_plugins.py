"""The contract of rewards: sound ones fulfil it, and each fault is caught by its check alone."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

import plugins
from rlhf_core.testing import RewardContract
from rlhf_core.testing.check import run_checks
from rlhf_core.testing.contract import Contract


class TestExact(RewardContract):
    reward = plugins.Exact


class TestLength(RewardContract):
    reward = plugins.Length


class TestLowest(RewardContract):
    reward = plugins.Lowest


class TestScaled(RewardContract):
    reward = plugins.Scaled
    changes: ClassVar = {"scale": 2.0}


class TestOfGroup(RewardContract):
    reward = plugins.OfGroup


class TestFunction(RewardContract):
    reward = plugins.length
    options: ClassVar = {"scale": 3}
    changes: ClassVar = {"scale": 2.0}


FAULTS: dict[type, dict[str, str]] = {
    plugins.OneScore: {"test_one_finite_float_a_sample": "1 scores for 8 samples"},
    plugins.NoScore: {"test_one_finite_float_a_sample": "not a finite float: sample .*: None"},
    plugins.Unordered: {
        "test_scores_follow_the_order_of_samples": "in another order: sample . scores",
        "test_scores_do_not_depend_on_company": "1 prompts at a time: sample . scores",
    },
    plugins.Relative: {"test_scores_do_not_depend_on_company": "1 prompts at a time: sample . scores"},
    plugins.Loose: {"test_steps_are_finite_floats": "steps of sample . in another order: sample 0 scores"},
    plugins.Numbered: {"test_group_numbers_mean_nothing": "with other group numbers: sample 0 scores"},
    plugins.Fussy: {"test_any_completion_has_a_score": r"completions that are cut off score \[nan"},
    plugins.PerWord: {"test_any_completion_has_a_score": "ZeroDivisionError"},
    plugins.Masked: {"test_any_completion_has_a_score": "TypeError"},
    plugins.Unscaled: {"test_options_change_scores": "`scale: 2.0` changes no score"},
    plugins.Dated: {"test_what_it_describes_is_recorded": "`describe` of a new instance says otherwise"},
    plugins.Opaque: {"test_what_it_describes_is_recorded": "`describe` returns what JSON can't hold"},
    plugins.Noisy: {"test_the_same_samples_score_the_same": "score otherwise the second time"},
    plugins.Writes: {"test_samples_are_left_alone": "sample 0 isn't as it was"},
    plugins.BadSteps: {"test_steps_are_finite_floats": "sample 0 has a step score that isn't a finite float"},
}


def contract(plugin: type) -> type[Contract]:
    members: dict[str, Any] = {"reward": plugin}
    if issubclass(plugin, plugins.Length) and plugin.Config is plugins.ScaledConfig:
        members["changes"] = {"scale": 2.0}
    return type("Contract", (RewardContract,), members)


@pytest.mark.parametrize("plugin", FAULTS, ids=lambda plugin: plugin.__name__)
def test_a_fault_is_caught_by_its_check_alone(plugin: type) -> None:
    failed = {check.name: check.reason for check in run_checks(contract(plugin)) if check.status == "failed"}
    assert failed.keys() == FAULTS[plugin].keys(), failed
    for name, pattern in FAULTS[plugin].items():
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(failed[name])


def test_every_check_can_fail() -> None:
    shared = {name for name in vars(Contract) if name.startswith("test_")}
    own = {*RewardContract.checks()} - shared
    assert {check for checks in FAULTS.values() for check in checks} == own
