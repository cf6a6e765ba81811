"""The trainers' contract: the core's methods fulfil it, and each fault is caught by the check that is meant for it."""

from __future__ import annotations

from typing import Any, ClassVar

import methods
import pytest

from rlhf_core.interfaces import Trainer
from rlhf_core.testing import TrainerContract
from rlhf_core.testing.arithmetic import Arithmetic
from rlhf_core.testing.check import Check, run_checks


class TestSFT(TrainerContract):
    method = "sft"


class TestDPO(TrainerContract):
    method = "dpo"


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
            row for terms in (2, 3) for row in Arithmetic(terms=terms, digits=1).rows(self.subject().record, 5, seed=1)
        ]


class TestOnline(Small):
    trainer = methods.Online


FAULTS: dict[type[Trainer], dict[str, str]] = {
    methods.Means: {
        "test_micro_batches_change_nothing": "with micro_batch_size 1: loss",
        "test_length_grouping_changes_nothing": "without length_grouped: loss",
    },
    methods.LooksAtPadding: {"test_padding_changes_nothing": "with padding: loss"},
    methods.ForgetsItsState: {
        "test_resume_is_exact": "step 3 differs after a resume: .*belongs into `state_dict`",
        "test_resume_of_a_stream_is_exact": "step 3 differs after a resume",
    },
    methods.TrainsNothing: {"test_trained_models_get_a_gradient": "the loss gives no trained parameter a gradient"},
    methods.OtherHeader: {"test_header_is_the_class": "`record` is 'unpaired' in the source .*methods.py:.* and 'sft'"},
    methods.BareOption: {"test_every_option_is_described": "no description: strength"},
    methods.LossyOption: {"test_configuration_survives_a_round_trip": "changed by writing and reading: strength"},
    methods.OpenOptions: {"test_schema_describes_the_configuration": "accepts options that it doesn't know"},
    methods.StageAsText: {"test_record_and_roles_are_known": "`stage` is 'warmup'"},
    methods.OtherTerms: {
        "test_every_term_has_a_weight": r"`loss` names the terms \['nll'\], `weights` \['loss'\]",
    },
    methods.WeighsByModel: {"test_weights_depend_on_the_batch_alone": "the weights of one batch were"},
    methods.NotFinite: {"test_loss_is_finite": "term `nll` is -inf"},
    methods.LeavesEvaluation: {"test_loss_leaves_no_trace": "leaves another mode"},
    methods.Seeds: {"test_loss_leaves_no_trace": "`loss` sets the state of the `torch` random generator"},
    methods.SeedsExperience: {"test_loss_leaves_no_trace": "`experience` sets the state of the `torch`"},
    methods.MovesTheFrozen: {"test_frozen_models_stay": "frozen, and changed: teacher"},
    methods.MovesTheReference: {
        "test_frozen_models_stay": "the reference moves as the policy learns",
        "test_loss_falls": "the loss is 0.6931 before and 0.6931 after 20 steps",
    },
    methods.DropsRows: {"test_experience_keeps_the_rows": "rows lost"},
    methods.ReportsMeans: {
        "test_metrics_change_nothing_with_micro_batches": r"`nll_mean` is .* instead of .*; report a pair \(sum, count\)",
    },
    methods.ReadsTheLayout: {
        "test_packing_changes_nothing": "packed: loss",
        "test_shared_prompts_change_nothing": "with share_prompts: loss",
    },
    methods.WantsSortedRows: {
        "test_length_grouping_changes_nothing": "without length_grouped: loss",
        "test_order_of_rows_changes_nothing": "in another order: loss",
    },
    methods.CountsPlaces: {
        "test_micro_batches_change_nothing": "with micro_batch_size 1: loss",
        "test_length_grouping_changes_nothing": "without length_grouped: loss",
        "test_order_of_rows_changes_nothing": "in another order: loss",
    },
    methods.ForgetsEmptyShares: {
        "test_a_share_without_rows_is_taken": "without rows the window has other columns: first",
    },
    methods.GathersWithinRows: {
        "test_processes_change_nothing": "don't gather equally often",
        "test_a_share_without_rows_is_taken": "gather",
    },
    methods.OwnMean: {"test_processes_change_nothing": "with 2 processes: loss"},
    methods.ClimbsUp: {"test_loss_falls": "the loss is .* before and .* after 20 steps"},
}


def contract(trainer: type[Trainer]) -> type[TrainerContract]:
    return type("Contract", (Small,), {"trainer": trainer})


@pytest.mark.parametrize(
    ("trainer", "check"),
    [(t, check) for t, checks in FAULTS.items() for check in checks],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_fault_is_caught(trainer: type[Trainer], check: str) -> None:
    with pytest.raises(Exception, match=FAULTS[trainer][check]):
        getattr(contract(trainer)(), check)()


@pytest.mark.slow
@pytest.mark.parametrize("trainer", FAULTS, ids=lambda trainer: trainer.__name__)
def test_a_fault_is_caught_by_its_check_alone(trainer: type[Trainer]) -> None:
    checks: list[Check] = list(run_checks(contract(trainer)))
    assert {check.name for check in checks if check.status == "failed"} == FAULTS[trainer].keys(), checks
    assert all(check.reason for check in checks if check.status != "ok")


def test_every_check_can_fail() -> None:
    caught = {check for checks in FAULTS.values() for check in checks}
    assert caught == set(TrainerContract.checks())
