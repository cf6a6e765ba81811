"""The contracts of rewards and samplers: sound plugins fulfil them, and each fault is caught by its check alone."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

import plugins
from rlhf_core.interfaces import INTERFACES
from rlhf_core.testing import RewardContract, SamplerContract
from rlhf_core.testing.check import run_checks
from rlhf_core.testing.contract import Contract


class TestExact(RewardContract):
    reward = plugins.Exact


class TestLength(RewardContract):
    reward = plugins.Length


class TestScaled(RewardContract):
    reward = plugins.Scaled
    changes: ClassVar = {"scale": 2.0}


class TestOfGroup(RewardContract):
    reward = plugins.OfGroup


class TestFunction(RewardContract):
    reward = plugins.length
    options: ClassVar = {"scale": 3}
    changes: ClassVar = {"scale": 2.0}


class TestEcho(SamplerContract):
    sampler = plugins.Echo


CONTRACTS: dict[str, type[Contract]] = {
    "reward": RewardContract,
    "sampler": SamplerContract,
}

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
    plugins.Alarmed: {
        "test_scores_in_a_thread_are_the_same": r"in a thread \(signals.*: sample 0 scores 0.0 instead of"
    },
    plugins.Unscaled: {"test_options_change_scores": "`scale: 2.0` changes no score"},
    plugins.Dated: {"test_what_it_describes_is_recorded": "`describe` of a new instance says otherwise"},
    plugins.Opaque: {"test_what_it_describes_is_recorded": "`describe` returns what JSON can't hold"},
    plugins.Noisy: {"test_the_same_samples_score_the_same": "score otherwise the second time"},
    plugins.Writes: {"test_samples_are_left_alone": "sample 0 isn't as it was"},
    plugins.BadSteps: {"test_steps_are_finite_floats": "sample 0 has a step score that isn't a finite float"},
    plugins.Fewer: {
        "test_n_completions_for_each_prompt": "prompt 0 gets 1 completions, not n = 3",
        "test_chat_messages_are_prompts_too": r"2 chats get \[1, 1\] completions",
    },
    plugins.ManyByDefault: {"test_one_completion_by_default": r"without n, the prompts get \[4, 4, 4\] completions"},
    plugins.TextOnly: {"test_chat_messages_are_prompts_too": "AttributeError: 'list' object has no attribute 'strip'"},
    plugins.WorstFirst: {"test_best_first": "prompt 0: the best isn't first"},
    plugins.NoLogprobs: {"test_completions_tell_how_they_were_drawn": "0 logprobs for 2 ids"},
    plugins.Positive: {"test_completions_tell_how_they_were_drawn": "not a log-probability"},
    plugins.UnknownEnd: {"test_completions_tell_how_they_were_drawn": "stop_reason is 'eos', not one of end, length"},
}


def contract(plugin: type) -> type[Contract]:
    kind = next(kind for kind in CONTRACTS if issubclass(plugin, INTERFACES[kind]))
    members: dict[str, Any] = {kind: plugin}
    if issubclass(plugin, plugins.Length) and plugin.Config is plugins.ScaledConfig:
        members["changes"] = {"scale": 2.0}
    return type("Contract", (CONTRACTS[kind],), members)


@pytest.mark.parametrize("plugin", FAULTS, ids=lambda plugin: plugin.__name__)
def test_a_fault_is_caught_by_its_check_alone(plugin: type) -> None:
    failed = {check.name: check.reason for check in run_checks(contract(plugin)) if check.status == "failed"}
    assert failed.keys() == FAULTS[plugin].keys(), failed
    for name, pattern in FAULTS[plugin].items():
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(failed[name])


def test_every_check_of_a_kind_can_fail() -> None:
    shared = {name for name in vars(Contract) if name.startswith("test_")}
    own = {name for base in CONTRACTS.values() for name in base.checks()} - shared
    assert {check for checks in FAULTS.values() for check in checks} == own
