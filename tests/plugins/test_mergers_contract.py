"""The mergers that ship with the core fulfil the contract of every merger."""

from __future__ import annotations

from typing import ClassVar
from unittest import SkipTest

import pytest

from rlhf_core import registry
from rlhf_core.testing import MergerContract
from rlhf_core.testing.runner import run_contract


class TestLinear(MergerContract):
    method = "linear"


class TestUniformSoup(MergerContract):
    method = "uniform_soup"


class TestTaskArithmetic(MergerContract):
    method = "task_arithmetic"


class TestModelStock(MergerContract):
    method = "model_stock"


class TestSlerp(MergerContract):
    method = "slerp"


class TestKarcher(MergerContract):
    method = "karcher"


class TestTIES(MergerContract):
    method = "ties"


class TestDARE(MergerContract):
    method = "dare"


class TestDAREWithAnElection(MergerContract):
    method = "dare"
    options: ClassVar = {"election": "ties"}


class TestDELLA(MergerContract):
    method = "della"


class TestBreadcrumbs(MergerContract):
    method = "breadcrumbs"


class TestBreadcrumbsWithAnElection(MergerContract):
    method = "breadcrumbs"
    options: ClassVar = {"scope": "tensor", "election": "ties"}


class TestSCE(MergerContract):
    method = "sce"


class TestLayerWise(MergerContract):
    method = "layer_wise"


@pytest.mark.parametrize("name", sorted(plugin.name for plugin in registry.find("merger")))
def test_checking_by_name_needs_no_options(name: str) -> None:
    assert run_contract("merger", name) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties", {"scale": 0.5}),
        ("dare", {"trim": 0.3, "scale": 2.0}),
        ("della", {"scale": 0.5}),
        ("breadcrumbs", {"scale": 0.5}),
        ("task_arithmetic", {"scale": 0.5}),
        ("layer_wise", {"t": 0.2}),
    ],
)
def test_checking_by_name_with_options(name: str, options: dict[str, float]) -> None:
    assert run_contract("merger", name, options=options) == 0


# The contract itself: what no plugin above can show.


def test_the_contract_keeps_to_what_a_merger_takes() -> None:
    assert (TestSlerp().count(), TestModelStock().count(), TestLinear().count()) == (2, 3, 3)

    class One(TestModelStock):
        models = 1

    assert One().count() == 2
    assert TestSlerp().weights() == pytest.approx([1 / 3, 2 / 3])
    assert TestUniformSoup().weights() == pytest.approx([1 / 3] * 3)
    with pytest.raises(SkipTest, match="the merger refuses weights of 0 and 1"):
        TestUniformSoup().test_weights_one_and_zero_select()
