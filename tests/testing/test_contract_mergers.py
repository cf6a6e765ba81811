"""The contract of mergers: sound ones fulfil it, and each fault is caught by its check alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import merger_plugins as mergers
import pytest
from planted_faults import assert_caught, assert_every_check_can_fail, contract_of

from rlhf_core.merging import Chunk, Merger
from rlhf_core.testing import MergerContract
from rlhf_core.testing.runner import run_checks

OPTIONS = "test_options_of_a_model_are_its_own"
FAULTS: dict[type[Merger], dict[str, str]] = {
    mergers.AddsToBase: {
        "test_copies_of_one_model_give_that_model": "copies of .*: the merged tensor is off by",
        "test_weights_one_and_zero_select": r"with the weights \[1.0, 0.0, 0.0\]: the merged tensor is off by",
    },
    mergers.IgnoresWeights: {"test_weights_one_and_zero_select": "the merged tensor is off by"},
    mergers.FirstWins: {
        "test_order_of_models_changes_nothing": "with the models in another order: the merged tensor is off by"
    },
    mergers.CountsPlaces: {
        "test_order_of_models_changes_nothing": "with the models in another order, the merged tensor has different bits"
    },
    mergers.Doubles: {
        "test_shape_is_kept_in_float32": r"got float64 of shape \[384\]; fix: return float32 of shape \[384\]"
    },
    mergers.Flattens: {
        "test_shape_is_kept_in_float32": r"got float32 of shape \[384\]; fix: return float32 of shape \[24, 16\]"
    },
    mergers.Drops: {"test_the_same_inputs_give_the_same_bits": "merging the same inputs again gives different bits"},
    mergers.Divides: {
        "test_copies_of_one_model_give_that_model": "copies of a base of zeros: the merged tensor has values that aren't finite"
    },
    mergers.NeedsBase: {
        "test_the_base_is_needed_as_declared": "the merger fails without a base, and doesn't declare `needs_base"
    },
    mergers.Unscaled: {"test_every_option_does_something": "options without any effect: scale;"},
    mergers.ByChunk: {
        "test_chunks_of_any_size_give_the_same_tensor": "in chunks of about 4 elements: the merged tensor is off by"
    },
    mergers.Remembers: {
        "test_tensors_do_not_depend_on_one_another": "a tensor has different bits when the merger has merged another tensor"
        " before"
    },
    mergers.Leaves: {"test_inputs_do_not_change": "merging changes its inputs: .*model-0/norms.json"},
    mergers.Appends: {"test_inputs_do_not_change": "merging changes its inputs: the merger's configuration"},
    mergers.OneForAll: {
        OPTIONS: "with the models in another order and `scale` given for a model: the merged tensor is off by"
    },
    mergers.NextOnes: {
        OPTIONS: "with the models in another order and `scale` given for a model: the merged tensor is off by"
    },
    mergers.ByPlace: {
        OPTIONS: "with the models in another order and `scale` given for a model: the merged tensor is off by"
    },
    mergers.Unread: {OPTIONS: r"`power` given for one model has no effect \(tried two\)"},
}


class TestLinear(MergerContract):
    merger = mergers.Linear


class TestScaled(MergerContract):
    merger = mergers.Scaled


class MaskedContract(MergerContract):
    """Gives each model a file of its own."""

    def own_options(self, folder: Path) -> Mapping[str, Sequence[Any]]:
        files = [folder / f"mask-{number}" for number in range(self.count())]
        for number, file in enumerate(files):
            file.write_text(str(1 / (number + 2)))
        return {"mask": files, "tags": [["flip"], [], ["other"]]}


class TestMasked(MaskedContract):
    merger = mergers.Masked


class Unmasked(mergers.Masked):
    """Adds models up, with fewer options of their own."""

    api = 1
    per_model = ("mask", "scale")

    def factors(self, chunk: Chunk) -> list[float]:
        return [one.options["scale"] for one in chunk.inputs]


def test_an_option_without_a_known_value_is_skipped_by_name_and_the_others_are_tried() -> None:
    one = contract_of(MergerContract, Unmasked)
    (found,) = (check for check in run_checks(one) if check.name == OPTIONS)
    assert (found.status, found.reason) == (
        "skipped", "return values of `mask` from `own_options` to test them; the other options pass"
    )  # fmt: skip


@pytest.mark.parametrize("plugin", FAULTS, ids=lambda plugin: plugin.__name__)
def test_a_fault_is_caught_by_its_check_alone(plugin: type[Merger]) -> None:
    base = MaskedContract if issubclass(plugin, mergers.Masked) else MergerContract
    assert_caught(contract_of(base, plugin), FAULTS[plugin])


def test_every_check_can_fail() -> None:
    assert_every_check_can_fail(MergerContract, FAULTS)
