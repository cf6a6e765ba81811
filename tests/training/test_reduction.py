"""Denominators by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.infra.errors import PluginError
from rlhf_core.training.reduction import Tally, numbers, objective, quotients, total_weights


def test_weights_add_up_over_micro_batches() -> None:
    assert total_weights([{"a": 3, "b": 1.0}, {"b": 2, "a": 1}], ["a", "b"], place="M") == {"a": 4.0, "b": 3.0}


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_must_be_a_measure(weight: float) -> None:
    with pytest.raises(PluginError, match="the weight of `a` must be finite and not negative") as caught:
        total_weights([{"a": weight}], ["a"], place="M")
    assert caught.value.exit_code == 5 and caught.value.place == "M.weights"


def test_micro_batches_must_agree_on_terms() -> None:
    with pytest.raises(PluginError, match="the terms differ between micro-batches"):
        total_weights([{"a": 1.0}, {"b": 1.0}], ["a"], place="M")


def test_the_objective_by_hand() -> None:
    """Two micro-batches of 1 and 3 tokens with losses 8 and 1, 1, 1: the mean is 11 / 4, not (8 + 1) / 2."""
    weights = {"nll": 4.0}
    parts = [objective({"nll": torch.tensor(total)}, weights, place="M") for total in (8.0, 3.0)]
    assert sum(float(part) for part in parts if part is not None) == 2.75


def test_terms_are_averaged_each_over_its_own() -> None:
    share = objective({"a": torch.tensor(6.0), "b": torch.tensor([10.0])}, {"a": 3.0, "b": 5.0}, place="M")
    assert share is not None and float(share) == 4.0 and share.shape == ()


def test_a_term_of_zero_weight_contributes_nothing_even_if_it_is_nan() -> None:
    term = torch.tensor(float("nan"), requires_grad=True)
    other = torch.tensor(2.0, requires_grad=True)
    share = objective({"a": term, "b": other}, {"a": 0.0, "b": 2.0}, place="M")
    assert share is not None
    share.backward()
    assert share.item() == 1.0 and term.grad is None and float(other.grad) == 0.5  # type: ignore[arg-type]
    assert objective({"a": term}, {"a": 0.0}, place="M") is None


@pytest.mark.parametrize("term", [torch.ones(2), 1.0])
def test_a_term_must_be_one_number(term: object) -> None:
    with pytest.raises(PluginError, match="term `a` must be the sum"):
        objective({"a": term}, {"a": 1.0}, place="M")  # type: ignore[dict-item]


def test_a_tally_adds_in_float64() -> None:
    tally = Tally()
    tally.add({"x": (torch.tensor(1.0), 2), "y": (3.0, torch.tensor(4))})
    tally.add({"x": (torch.tensor(2.0**30, dtype=torch.float64) + 1, 2.0), "z": (1.0, 0.0)})
    assert tally.totals() == {"x": (2.0**30 + 2, 4.0), "y": (3.0, 4.0), "z": (1.0, 0.0)}
    assert quotients(tally.totals()) == {"x": (2.0**30 + 2) / 4, "y": 0.75}


def test_values_are_read_together_and_each_is_its_own() -> None:
    values = [torch.tensor(1.5), 2, torch.tensor(3, dtype=torch.int64), torch.tensor(0.25), torch.tensor(True)]
    assert numbers(values) == [1.5, 2.0, 3.0, 0.25, 1.0]
