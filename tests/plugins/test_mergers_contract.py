"""The mergers that ship with the core fulfil the contract of every merger."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import pytest

from rlhf_core import registry
from rlhf_core.testing import MergerContract
from rlhf_core.testing.runner import run_contract


class TestLinear(MergerContract):
    """Collected by pytest, as a plugin author writes it; the others are checked by `run_contract` below."""

    method = "linear"


@pytest.mark.parametrize("name", sorted(plugin.name for plugin in registry.find("merger")))
def test_every_merger_fulfils_its_contract(name: str) -> None:
    assert run_contract("merger", name) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties", {"scale": 0.5}),
        ("dare", {"trim": 0.3, "scale": 2.0}),
        ("dare", {"election": "ties"}),
        ("della", {"scale": 0.5}),
        ("breadcrumbs", {"scale": 0.5}),
        ("breadcrumbs", {"scope": "tensor", "election": "ties"}),
        ("task_arithmetic", {"scale": 0.5}),
        ("layer_wise", {"t": 0.2}),
    ],
)
def test_mergers_with_options_fulfil_their_contract(name: str, options: dict[str, Any]) -> None:
    assert run_contract("merger", name, options=options) == 0


# Fixtures of the contract that depend on what a merger allows


def contract(name: str, **members: Any) -> MergerContract:
    return type("Contract", (MergerContract,), {"method": name, **members})()


def test_the_number_of_models_is_within_what_the_merger_allows() -> None:
    counts = [contract("slerp").count(), contract("model_stock").count(), contract("linear").count()]
    assert counts == [2, 3, 3]
    assert contract("model_stock", models=1).count() == 2


def test_weights_are_equal_where_the_merger_refuses_others() -> None:
    assert contract("slerp").weights() == pytest.approx([1 / 3, 2 / 3])
    assert contract("uniform_soup").weights() == pytest.approx([1 / 3] * 3)
    with pytest.raises(SkipTest, match="the merger refuses weights of 0 and 1"):
        contract("uniform_soup").test_weights_one_and_zero_select()
