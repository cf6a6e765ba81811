"""Paired tests of a drop: by hand, against scipy's where it is installed, their level under no change, and Holm's correction."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.improvement.paired_tests import EXACT, holm, mcnemar_test, paired_test, sign_flip_test


def test_mcnemar_by_hand() -> None:
    # P(X >= 5 of 6) = (6 + 1) / 64.
    assert mcnemar_test(5, 1) == 7 / 64
    assert mcnemar_test(0, 0) == 1 and mcnemar_test(0, 7) == 1
    assert mcnemar_test(10, 0) == 2**-10


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_a_tail_of_the_binomial_distribution(losses: int, gains: int) -> None:
    mass = np.ones(1)
    for _ in range(losses + gains):
        mass = np.convolve(mass, [0.5, 0.5])
    assert mcnemar_test(losses, gains) == pytest.approx(float(mass[losses:].sum()), rel=1e-9)


def test_sign_flips_by_hand() -> None:
    # Sums of ±1 ±2 ±3 at most -4: -6 (all), -4 (1 flipped): 2 of 8.
    assert sign_flip_test([1.0, -2.0, -3.0]) == 2 / 8
    assert sign_flip_test([0.0, 0.0]) == 1
    assert sign_flip_test([-0.1] * 3) == 1 / 8
    # 0.1 + 0.2 isn't 0.3: patterns that differ by rounding alone count as equal.
    tried = [
        sum(s * v for s, v in zip(signs, (1, 2, 3), strict=True)) for signs in itertools.product((1, -1), repeat=3)
    ]
    assert sign_flip_test([0.1, 0.2, -0.3]) == sum(one <= 0 for one in tried) / 8


@given(st.integers(0, EXACT), st.integers(0, EXACT))
def test_sign_flips_of_right_and_wrong_are_mcnemars(losses: int, gains: int) -> None:
    if losses + gains <= EXACT:
        assert sign_flip_test([-1.0] * losses + [1.0] * gains + [0.0] * 5) == pytest.approx(mcnemar_test(losses, gains))


def test_random_flips_approach_the_exact_value() -> None:
    losses, gains = 25, 12
    exact = mcnemar_test(losses, gains)
    found = sign_flip_test([-1.0] * losses + [1.0] * gains, resamples=100_000)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact / 100_000))
    assert found == sign_flip_test([-1.0] * losses + [1.0] * gains, resamples=100_000)
    assert sign_flip_test([-1.0] * 60, resamples=1000) == 1 / 1001  # never 0


def test_false_alarms_keep_to_alpha() -> None:
    generator = np.random.default_rng(0)
    graded = [sign_flip_test(generator.normal(size=12).tolist()) <= 0.05 for _ in range(600)]
    binary = []
    for _ in range(2000):
        right = generator.random((2, 80)) < 0.6
        _, p = paired_test(right[0].astype(float).tolist(), right[1].astype(float).tolist())
        binary.append(p <= 0.05)
    # Three standard errors of a share of 0.05; the exact binomial test is below its level.
    assert np.mean(graded) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)
    assert 0.01 < np.mean(binary) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_which_test_is_taken() -> None:
    assert paired_test([1, 1, 0], [0, 1, 0]) == ("mcnemar", 0.5)
    assert paired_test([0.5, 1, 0], [0, 1, 0]) == ("sign_flip", 0.5)


def test_holm_by_hand() -> None:
    # Sorted: 0.01 × 4, 0.02 × 3 = 0.06, 0.03 × 2 = 0.06, 0.9.
    assert holm([0.02, 0.9, 0.01, 0.03]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_no_correction_and_bonferronis(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for own, q in zip(p_values, adjusted, strict=True):
        assert own <= q <= min(1.0, len(p_values) * own) + 1e-12
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[at] for at in order] == sorted(adjusted)
