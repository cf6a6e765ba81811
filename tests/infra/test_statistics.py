"""Figures of held-out sets, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.infra.statistics import auc, calibration_error


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_auc_is_the_share_of_pairs_in_order(good: list[int], bad: list[int]) -> None:
    pairs = [(g > b) + 0.5 * (g == b) for g in good for b in bad]
    found = auc(torch.tensor(good, dtype=torch.float64), torch.tensor(bad, dtype=torch.float64))
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_by_hand() -> None:
    confidence = torch.tensor([0.9, 0.6, 0.8, 0.7], dtype=torch.float64)
    right = torch.tensor([True, False, True, True])
    # Bins {0.6, 0.7} with half right and {0.8, 0.9} with all right: (2 * 0.15 + 2 * 0.15) / 4.
    assert calibration_error(confidence, right, bins=2) == pytest.approx(0.15)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30))
def test_who_is_sure_and_right_is_calibrated(outcomes: list[float]) -> None:
    values = torch.tensor(outcomes, dtype=torch.float64)
    assert calibration_error(values, values > 0.5) == 0.0
    assert calibration_error(torch.ones_like(values), torch.zeros_like(values).bool()) == 1.0
