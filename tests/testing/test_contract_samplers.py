"""The contract of samplers: sound ones fulfil it, and each fault is caught by its check alone."""

from __future__ import annotations

from typing import ClassVar

import pytest
import sampler_plugins as plugins

from rlhf_core.contracts.sampler import Sampler
from rlhf_core.testing import SamplerContract
from rlhf_core.testing.check import run_checks
from rlhf_core.testing.contract import Contract


class TestPlain(SamplerContract):
    sampler = plugins.Plain


class TestConfigured(SamplerContract):
    sampler = plugins.Configured


class TestGreedy(SamplerContract):
    sampler = plugins.Plain
    options: ClassVar = {"temperature": 0}


class TestRanked(SamplerContract):
    sampler = plugins.Ranked


FAULTS: dict[type[Sampler], dict[str, str]] = {
    plugins.Fewer: {"test_n_completions_for_each_prompt": "prompt 0 gets 3 completions, not n = 4"},
    plugins.ManyByDefault: {"test_one_completion_by_default": r"without n, the prompts get \[4, 4, 4\] completions"},
    plugins.TextOnly: {"test_chat_messages_are_prompts_too": "chat 0: `raw_logprobs` of token 0 is"},
    plugins.NoRows: {"test_rows_are_prompts_too": "row 0: `raw_logprobs` of token 0 is"},
    plugins.NoColumns: {"test_rows_are_prompts_too": r"the rows' `answer` .* reaches the reward as \['None'\]"},
    plugins.WorstFirst: {"test_best_first": "prompt 0: the best isn't first"},
    plugins.ScoresOfTheNext: {"test_best_first": "a completion's score is .*, which the reward gave another one"},
    plugins.KeepsTheLeast: {"test_larger_rewards_are_kept": "under its opposite: a larger reward is a better one"},
    plugins.CopiesTheFirst: {"test_other_seeds_draw_otherwise": "are all the same one, though tokens are drawn"},
    plugins.IdleOption: {"test_every_option_does_something": "no effect on completions or scores: draws;"},
    plugins.OneScored: {"test_best_first": "prompt 0: not all scores are finite floats"},
    plugins.RelativeScores: {"test_completions_do_not_depend_on_company": "prompt . alone scores"},
    plugins.NoLogprobs: {"test_completions_tell_how_they_were_drawn": "0 logprobs for"},
    plugins.Positive: {"test_completions_tell_how_they_were_drawn": "not a log-probability"},
    plugins.UnknownEnd: {"test_completions_tell_how_they_were_drawn": "stop_reason is 'eos', not one of end, length"},
    plugins.LostEnd: {
        "test_completions_tell_how_they_were_drawn": "stop_reason is 'end', and the last id is no end token"
    },
    plugins.StrippedText: {"test_completions_tell_how_they_were_drawn": "isn't what its ids say"},
    plugins.TemperedAsRaw: {"test_log_probabilities_are_the_policys": "prompt 0: `raw_logprobs` of token 0 is"},
    plugins.RawAsDrawn: {"test_log_probabilities_are_the_policys": "prompt 0: `logprobs` of token 0 is"},
    plugins.Seedless: {"test_a_seed_repeats_the_completions": "again, the same seed draws otherwise"},
    plugins.OneSeed: {"test_other_seeds_draw_otherwise": "another seed gives the same completions"},
    plugins.ZeroByDefault: {
        "test_other_seeds_draw_otherwise": "without a seed, a second call gives the same completions"
    },
    plugins.SeedByPlace: {"test_completions_do_not_depend_on_company": "prompt . alone gets other completions"},
    plugins.FixedOptions: {"test_sampling_options_count": "with `max_new_tokens: 3` a completion has"},
    plugins.SilentlyCut: {"test_sampling_options_count": "`kept_mass` says that nothing was cut off"},
    plugins.CutAsDrawn: {"test_sampling_options_count": "with truncation, prompt 0: `logprobs` of token 0 is"},
    plugins.TakesPrompts: {"test_prompts_are_left_alone": "the prompts aren't as they were"},
    plugins.SeedsTheWorld: {"test_global_random_state_is_left_alone": "moves the global random state of torch_cpu"},
    plugins.AtMostEight: {"test_n_completions_for_each_prompt": "prompt 0 gets 8 completions, not n = 17"},
    plugins.LeftInEvaluation: {"test_models_are_left_alone": "`policy` was training, and is left otherwise"},
}


@pytest.mark.parametrize("plugin", FAULTS, ids=lambda plugin: plugin.__name__)
def test_a_fault_is_caught_by_its_check_alone(plugin: type[Sampler]) -> None:
    contract = type("Contract", (SamplerContract,), {"sampler": plugin})
    failed = {check.name: check.reason for check in run_checks(contract) if check.status == "failed"}
    assert failed.keys() == FAULTS[plugin].keys(), failed
    for name, pattern in FAULTS[plugin].items():
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(failed[name])


def test_every_check_can_fail() -> None:
    own = {*SamplerContract.checks()} - {name for name in vars(Contract) if name.startswith("test_")}
    assert {check for checks in FAULTS.values() for check in checks} == own
