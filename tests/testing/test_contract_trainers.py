"""The trainers' contract: the core's methods fulfil it, and each fault is caught by the check that is meant for it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import trainer_plugins as trainers
from planted_faults import contract_of

from rlhf_core.contracts.trainer import Trainer
from rlhf_core.testing import TrainerContract
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.runner import CheckResult, run_checks


class TestSFT(TrainerContract):
    method = "sft"
    first_loss = "nll"


@pytest.mark.slow
class TestSFTOnPrompts(TrainerContract):
    method = "sft"
    options: ClassVar = {"prompt_loss_weight": 0.5, "neftune_alpha": 5.0}


class TestDPO(TrainerContract):
    method = "dpo"
    first_loss = math.log(2)


@pytest.mark.slow
class TestHingeWithAdapters(TrainerContract):
    method = "dpo"
    options: ClassVar = {"loss_type": "hinge", "reference": "adapter_off", "lora": {"rank": 4}}


@pytest.mark.slow
class TestIPOWithPrecomputedReference(TrainerContract):
    method = "dpo"
    options: ClassVar = {"loss_type": "ipo", "reference": "precompute", "gradient_checkpointing": True}


@pytest.mark.slow
class TestSmoothedWithAdaptersAndCopy(TrainerContract):
    method = "dpo"
    options: ClassVar = {"label_smoothing": 0.1, "beta": 0.5, "reference": "copy", "lora": {"rank": 4}}


class Small(TrainerContract):
    def rows(self) -> list[dict[str, Any]]:
        return [
            row
            for terms in (2, 3)
            for row in ArithmeticTask(terms=terms, digits=1).rows(self.subject().record, 5, seed=1)
        ]


class TestOnline(Small):
    trainer = trainers.Online


@pytest.mark.slow
class TestOnlineOverAConstant(Small):
    trainer = trainers.OnlineOverAConstant


@pytest.mark.slow
class TestOnlineOverTheStep(Small):
    trainer = trainers.OnlineOverTheStep


FAULTS: dict[type[Trainer], dict[str, str]] = {
    trainers.Means: {
        "test_micro_batches_change_nothing": "with micro_batch_size 1, the first update changes: loss",
        "test_length_grouping_changes_nothing": "without length_grouped, the first update changes: loss",
    },
    trainers.LooksAtPadding: {"test_padding_changes_nothing": "with padding, the first update changes: loss"},
    trainers.ForgetsItsState: {
        "test_resume_is_exact": "metrics of step 4 differ after a resume from step 3: .*return from `state_dict`",
        "test_resume_of_a_stream_is_exact": "metrics of step 6 differ after a resume from step 5",
    },
    trainers.TrainsNothing: {"test_trained_models_get_a_gradient": "the loss gives no trained parameter a gradient"},
    trainers.OtherHeader: {
        "test_header_agrees_with_the_class": "`record` is 'unpaired' in the source .*trainer_plugins.py:.* and 'sft'"
    },
    trainers.BareOption: {"test_every_option_is_described": "options without a description: strength"},
    trainers.LossyOption: {
        "test_configuration_survives_a_round_trip": "options that change when the configuration is written as JSON and read"
        " again: strength"
    },
    trainers.OpenOptions: {"test_schema_describes_the_configuration": "accepts unknown options"},
    trainers.StageAsText: {"test_record_and_roles_are_known": "`stage` is 'warmup'"},
    trainers.OtherTerms: {
        "test_every_term_has_a_weight": r"`loss` returns the terms \['nll'\], `weights` weighs \['loss'\]",
    },
    trainers.WeighsByModel: {
        "test_weights_depend_on_the_batch_alone": "`weights` returns .* for the same batch after an update"
    },
    trainers.NotFinite: {"test_loss_is_finite": "term `nll` is -inf"},
    trainers.LeavesEvaluation: {"test_loss_leaves_no_trace": "`loss` changes the mode"},
    trainers.Seeds: {"test_loss_leaves_no_trace": "`loss` seeds the global random generator of `torch`"},
    trainers.SeedsExperience: {
        "test_loss_leaves_no_trace": "`experience` seeds the global random generator of `torch`"
    },
    trainers.MovesTheFrozen: {"test_frozen_models_do_not_change": "weights of frozen models change: teacher"},
    trainers.MovesTheReference: {
        "test_frozen_models_do_not_change": "the reference's log-probabilities change as the policy learns",
        "test_loss_falls": "doesn't lower the loss: it is 0.6931 before and 0.6931 after 20 steps",
    },
    trainers.DropsRows: {"test_experience_keeps_the_rows": "rows of the data that no window of `experience` holds"},
    trainers.ReportsMeans: {
        "test_metrics_change_nothing_with_micro_batches": "`nll_mean` is .* instead of .*; report a metric as a pair",
    },
    trainers.ReadsTheLayout: {
        "test_packing_changes_nothing": "with packed rows, the first update changes: loss",
        "test_shared_prompts_change_nothing": "with share_prompts, the first update changes: loss",
    },
    trainers.WantsSortedRows: {
        "test_length_grouping_changes_nothing": "without length_grouped, the first update changes: loss",
        "test_order_of_rows_changes_nothing": "with rows in another order, the first update changes: loss",
    },
    trainers.CountsPlaces: {
        "test_micro_batches_change_nothing": "with micro_batch_size 1, the first update changes: loss",
        "test_length_grouping_changes_nothing": "without length_grouped, the first update changes: loss",
        "test_order_of_rows_changes_nothing": "with rows in another order, the first update changes: loss",
    },
    trainers.ForgetsEmptyShares: {
        "test_a_process_without_rows_takes_part": "the window of a process without rows has other columns than the others':"
        " first",
    },
    trainers.GathersWithinRows: {
        "test_processes_change_nothing": "call `run.gather` a different number of times",
        "test_a_process_without_rows_takes_part": "gather",
    },
    trainers.OwnMean: {"test_processes_change_nothing": "with 2 processes, the first update changes: loss"},
    trainers.ClimbsUp: {"test_loss_falls": "doesn't lower the loss: it is .* before and .* after 20 steps"},
    # A denominator off by a factor
    trainers.DoubleTokens: {
        "test_weights_count_what_is_summed": "`nll` sums .* entries, one per token in the loss, .*, 2 times that",
        "test_first_loss_is_the_known_one": "0.5 times the negative log-likelihood per token",
    },
    trainers.PromptTokens: {"test_weights_count_what_is_summed": "the number of tokens of prompts and responses"},
    trainers.TokensOfResponses: {"test_weights_count_what_is_summed": "of the responses, in the loss mask or not"},
    trainers.OnePerMicroBatch: {
        "test_weights_count_what_is_summed": "is 1 for a window, and 8 for its rows one by one, added up"
    },
    trainers.ResponsesOfPairs: {"test_weights_count_what_is_summed": "entries, one per prompt, .*, 2 times that"},
    trainers.PromptsOfGroups: {"test_repeated_rows_change_nothing": "with every response repeated"},
    # Gradients
    trainers.ReadsTheStartWithGradient: {
        "test_gradient_comes_through_the_loss_alone": "the gradient of term .* reaches a tensor of shape .*, which no role"
        " trains",
    },
    trainers.AttachesTheGraph: {"test_experience_keeps_the_rows": "column `logps` of a window requires gradients"},
    trainers.KeepsTheGraph: {
        "test_gradient_comes_through_the_loss_alone": "runs through a tensor that was computed before `loss`"
    },
    trainers.FlatKL: {
        "test_every_option_does_something": "options that change the loss and not its gradient: kl_weight"
    },
    trainers.FlatKLAlone: {
        "test_every_option_does_something": "options that change the loss and not its gradient: kl_weight"
    },
    trainers.RatioOfOne: {"test_ratios_follow_the_policy": "the ratio of the two policies is always 1"},
    # Tokens
    trainers.ScoresWhatItSees: {"test_no_token_is_seen_before_it_is_scored": "read at position t - 1"},
    trainers.LosesTheEnd: {"test_no_token_is_lost": "the last token of a response isn't in the loss"},
    trainers.LosesTheFirst: {"test_no_token_is_lost": "the first token of a response isn't in the loss"},
    trainers.MasksTheEnd: {"test_no_token_is_lost": "its end token, isn't in the loss"},
    trainers.CutsTheEnd: {"test_no_token_is_lost": "completions lose their end token"},
    trainers.ScoresAtOne: {"test_temperature_reaches_the_loss": "`generation.temperature` doesn't reach the loss"},
    trainers.RatioToTheRaw: {"test_temperature_reaches_the_loss": "`sampled_logps`, not `raw_logps`"},
    trainers.SwapsTheReference: {"test_frozen_models_do_not_change": "column `ref_logps` holds .* of other responses"},
    # The sign
    trainers.Unlearns: {"test_it_learns_in_the_right_direction": "the loss has the wrong sign"},
    trainers.PrefersTheRejected: {"test_it_learns_in_the_right_direction": "the loss has the wrong sign"},
    trainers.LowersRewards: {"test_it_learns_in_the_right_direction": "training doesn't raise the mean reward"},
    # Rewards and owners
    trainers.NoAdvantage: {"test_rewards_decide_the_gradient": "the loss contains no reward or advantage"},
    trainers.RewardsByPlace: {"test_order_of_rows_changes_nothing": "does each get its own reward"},
    trainers.BaselineOfOthers: {"test_order_of_rows_changes_nothing": "does each get its own reward"},
    trainers.RewardsOfTheNext: {"test_order_of_rows_changes_nothing": "does each get its own reward"},
    # Draws
    trainers.ConstantSeeds: {"test_completions_differ": "rows with equal prompts get the same completions in one step"},
    trainers.OneSeedOfAGroup: {"test_completions_differ": "completions of row .* are all equal"},
    trainers.SeedsWithoutStep: {"test_completions_differ": "the same completions in two steps"},
    # Processes
    trainers.WhitensAlone: {"test_processes_change_nothing": "with 2 processes, the first update changes: loss"},
    trainers.GathersPerRow: {"test_processes_change_nothing": "call `run.gather` a different number of times"},
    trainers.LogsMeans: {"test_processes_change_nothing": r"`length` is .* instead of .*; report a metric as a pair"},
    # Options
    trainers.IgnoresClip: {"test_every_option_does_something": "options without any effect: clip;"},
    trainers.IgnoresTopK: {"test_every_option_does_something": "options without any effect: generation.top_k;"},
    trainers.IgnoresSmoothing: {"test_every_option_does_something": "options without any effect: label_smoothing;"},
    # Windows, evaluations, runs
    trainers.CountsBatches: {"test_windows_are_counted": "returns 1, but 5 batches give 20 windows"},
    trainers.EndsEachWindow: {"test_windows_are_counted": "belongs to a rollout whose last window was already yielded"},
    trainers.HeldOutTwice: {"test_held_out_rows_count_once": "are scored more than once"},
    trainers.RemembersHeldOutRows: {"test_held_out_rows_count_once": "an evaluation changes the method's state"},
    trainers.EvaluatesItsEpochs: {"test_held_out_rows_count_once": "are scored more than once"},
    trainers.EvaluatesMeans: {
        "test_held_out_rows_count_once": "the count of `score` is 1 for held-out rows evaluated together"
    },
    trainers.RemembersOne: {"test_resume_is_exact": "differ after a resume from step"},
    trainers.EveryFourth: {"test_resume_is_exact": "differ after a resume from step"},
}


def contract(trainer: type[Trainer]) -> type[TrainerContract]:
    options = {"kl_weight": 0.1} if trainer is trainers.FlatKLAlone else {}
    return contract_of(Small, trainer, options=options)  # type: ignore[return-value]


LONG = {trainers.IgnoresClip, trainers.IgnoresTopK, trainers.FlatKL, trainers.FlatKLAlone}
"""Methods whose fault is found by trying many values."""


@pytest.mark.parametrize(
    ("trainer", "check"),
    [
        pytest.param(t, check, marks=[pytest.mark.slow] if t in LONG else [])
        for t, checks in FAULTS.items()
        for check in checks
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_fault_is_caught(trainer: type[Trainer], check: str) -> None:
    with pytest.raises(Exception, match=FAULTS[trainer][check]):
        getattr(contract(trainer)(), check)()


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [trainers.Means, trainers.NoAdvantage], ids=lambda trainer: trainer.__name__)
def test_a_fault_is_reported_with_its_reason(trainer: type[Trainer]) -> None:
    checks: list[CheckResult] = list(run_checks(contract(trainer)))
    assert {check.name for check in checks if check.status == "failed"} >= FAULTS[trainer].keys(), checks
    assert all(check.reason for check in checks if check.status != "ok")


def test_every_check_can_fail() -> None:
    caught = {check for checks in FAULTS.values() for check in checks}
    assert caught == set(TrainerContract.checks())
