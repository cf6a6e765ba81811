"""The contract of samplers: sound ones fulfil it, and each fault is caught by its check alone."""

from __future__ import annotations

from typing import ClassVar

import pytest
import sampler_plugins as samplers
from planted_faults import assert_caught, assert_every_check_can_fail, contract_of

from rlhf_core.contracts.sampler import Sampler
from rlhf_core.testing import SamplerContract


class TestPlain(SamplerContract):
    sampler = samplers.Plain


class TestConfigured(SamplerContract):
    sampler = samplers.Configured


class TestGreedy(SamplerContract):
    sampler = samplers.Plain
    options: ClassVar = {"temperature": 0}


class TestRanked(SamplerContract):
    sampler = samplers.Ranked


FAULTS: dict[type[Sampler], dict[str, str]] = {
    samplers.Fewer: {"test_n_completions_for_each_prompt": "prompt 0 gets 3 completions, not n = 4"},
    samplers.ManyByDefault: {"test_one_completion_by_default": r"without `n`, the prompts get \[4, 4, 4\] completions"},
    samplers.TextOnly: {"test_chat_messages_are_prompts_too": "chat 0: `raw_logprobs` of token 0 is"},
    samplers.NoRows: {"test_rows_are_prompts_too": "row 0: `raw_logprobs` of token 0 is"},
    samplers.NoColumns: {
        "test_rows_are_prompts_too": r"the column `answer` of the rows, .*, reaches the reward as \['None'\]"
    },
    samplers.WorstFirst: {"test_best_first": "prompt 0: completions aren't sorted with the best first"},
    samplers.ScoresOfTheNext: {
        "test_best_first": "a completion's score is .*, which the reward gave to another completion"
    },
    samplers.KeepsTheLeast: {"test_larger_rewards_are_kept": "under its opposite: larger rewards must be better"},
    samplers.CopiesTheFirst: {"test_other_seeds_draw_otherwise": "are all equal, though tokens are drawn"},
    samplers.IdleOption: {
        "test_every_option_does_something": "options without any effect on completions or scores: draws;"
    },
    samplers.OneScored: {"test_best_first": "prompt 0: some scores aren't finite floats"},
    samplers.RelativeScores: {
        "test_completions_do_not_depend_on_other_prompts": "a completion of prompt . scores .* alone and"
    },
    samplers.NoLogprobs: {"test_completions_are_complete": "a completion has 0 `logprobs` for"},
    samplers.Positive: {"test_completions_are_complete": "`logprobs` holds .*, no log-probabilities"},
    samplers.UnknownEnd: {
        "test_completions_are_complete": "`stop_reason` is 'eos', not one of end, length, stop, rule"
    },
    samplers.LostEnd: {"test_completions_are_complete": "`stop_reason` is 'end', but the last id is no end token"},
    samplers.StrippedText: {"test_completions_are_complete": "but its ids decode to"},
    samplers.ShortMask: {"test_completions_are_complete": "a completion has .* values of `mask` for"},
    samplers.TemperedAsRaw: {"test_log_probabilities_are_the_policys": "prompt 0: `raw_logprobs` of token 0 is"},
    samplers.RawAsDrawn: {"test_log_probabilities_are_the_policys": "prompt 0: `logprobs` of token 0 is"},
    samplers.Seedless: {
        "test_a_seed_repeats_the_completions": "with the same seed, a second call gives other completions"
    },
    samplers.OneSeed: {"test_other_seeds_draw_otherwise": "another seed gives the same completions"},
    samplers.ZeroByDefault: {
        "test_other_seeds_draw_otherwise": "without a seed, a second call gives the same completions"
    },
    samplers.SeedByPlace: {"test_completions_do_not_depend_on_other_prompts": "prompt . gets other completions alone"},
    samplers.BudgetByPlace: {
        "test_completions_do_not_depend_on_other_prompts": "prompt . gets other completions where the prompts come in"
    },
    samplers.FixedOptions: {"test_sampling_options_take_effect": "with `max_new_tokens: 3` a completion has"},
    samplers.SilentlyCut: {
        "test_sampling_options_take_effect": "every `kept_mass` is 1, as if nothing had been truncated"
    },
    samplers.CutAsDrawn: {
        "test_sampling_options_take_effect": "with top-p and top-k, prompt 0: `logprobs` of token 0 is"
    },
    samplers.OtherMass: {
        "test_sampling_options_take_effect": "`kept_mass` of token . is .*, but the policy gives its 2 likeliest"
    },
    samplers.TakesPrompts: {"test_prompts_do_not_change": "`sample` changes its prompts"},
    samplers.SeedsTheWorld: {
        "test_global_random_state_does_not_change": "changes the global random state of torch_cpu"
    },
    samplers.AtMostEight: {"test_n_completions_for_each_prompt": "prompt 0 gets 8 completions, not n = 17"},
    samplers.LeftInEvaluation: {"test_models_do_not_change": "sampling leaves modules of `policy` in evaluation mode"},
}


@pytest.mark.parametrize(
    ("plugin", "check"),
    [(plugin, check) for plugin, checks in FAULTS.items() for check in checks],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_is_caught(plugin: type[Sampler], check: str) -> None:
    with pytest.raises(Exception, match=FAULTS[plugin][check]):
        getattr(contract_of(SamplerContract, plugin)(), check)()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", FAULTS, ids=lambda plugin: plugin.__name__)
def test_a_fault_is_caught_by_its_check_alone(plugin: type[Sampler]) -> None:
    assert_caught(contract_of(SamplerContract, plugin), FAULTS[plugin])


def test_every_check_can_fail() -> None:
    assert_every_check_can_fail(SamplerContract, FAULTS)
