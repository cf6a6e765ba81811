"""Estimates: standard errors and intervals against tables, definitions and simulations of their coverage."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from random import Random
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.evaluation.estimate import (
    Estimate,
    bootstrap_estimate,
    mean_estimate,
    paired_difference,
    paired_shares_interval,
    ratio_difference,
    ratio_estimate,
    share_estimate,
    student_quantile,
    wilson_interval,
)

SHARES = st.lists(st.integers(0, 8).map(lambda right: right / 8), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (29, 2.04523), (120, 1.97993)]
)
def test_students_quantiles_are_those_of_printed_tables(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, rel=2e-6)


def test_students_quantiles_for_many_values_are_nearly_normal_and_without_a_jump() -> None:
    assert student_quantile(0.975, 10**7) == pytest.approx(1.959964, abs=1e-6)
    assert student_quantile(0.975, 1000) == pytest.approx(student_quantile(0.975, 1001), abs=1e-5)


def test_students_quantile_against_its_density() -> None:
    """The density, integrated numerically to the quantile, gives its share."""
    for freedom, share in [(4, 0.9), (5, 0.975), (7, 0.995)]:
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        end, steps = student_quantile(share, freedom), 20_000
        middles = ((i + 0.5) * end / steps for i in range(steps))
        area = math.fsum(scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2) for t in middles) * end / steps
        assert 0.5 + area == pytest.approx(share, abs=1e-8)


def test_a_mean_by_hand() -> None:
    """1, 2, 3: mean 2, s = 1, error 1/√3; Student's interval with 2 degrees of freedom."""
    found = mean_estimate([1, 2, 3])
    assert (found.value, found.count) == (2, 3) and found.error == pytest.approx(1 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3)) and found.low == pytest.approx(4 - found.high)
    assert mean_estimate([5.0]) == Estimate(5.0, None, 1)
    assert paired_difference([1, 2, 3], [2, 4, 6]) == found


def test_the_interval_of_a_difference_of_shares_by_hand() -> None:
    """Of 20 pairs 6 got better and 1 worse: with one more of each, 7/22 − 2/22 ± z √((7/22 + 2/22 − (5/22)²)/22)."""
    before, after = [0] * 6 + [1] + [0] * 13, [1] * 6 + [0] + [0] * 13
    found = paired_difference(before, after, shares=True)
    width = 1.959964 * math.sqrt((9 / 22 - (5 / 22) ** 2) / 22)
    assert (found.low, found.high) == pytest.approx((5 / 22 - width, 5 / 22 + width), abs=1e-6)
    plain = paired_difference(before, after)
    assert (found.value, found.error) == (plain.value, plain.error) and found.low != plain.low
    assert found == ratio_difference([(s, 1) for s in before], [(s, 1) for s in after], shares=True)


def test_shares_that_did_not_change_may_have_changed_all_the_same() -> None:
    """Of 40 pairs none changed: ± z √((2/42)/42). Numbers of another kind, such as lengths, are equal where they are."""
    for same in ([0.0] * 40, [1.0] * 40, [0.25] * 40):
        found = paired_difference(same, same, shares=True)
        assert (found.value, found.error, found.high) == (0, 0, pytest.approx(1.959964 * math.sqrt(2) / 42))
        assert found.low == pytest.approx(-found.high)
    assert paired_difference([7.0] * 3, [7.0] * 3) == Estimate(0, 0, 3, 0, 0)
    assert paired_difference([0.0], [1.0], shares=True) == Estimate(1, None, 1)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60))
def test_the_interval_of_a_difference_of_shares_holds_it(pairs: list[tuple[int, int]]) -> None:
    before, after = zip(*pairs, strict=True)
    found, turned = (paired_difference(*both, shares=True) for both in ((before, after), (after, before)))
    assert found.low is not None and found.high is not None
    assert -1 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize(("better", "worse"), [(0.0, 0.0), (0.02, 0.0), (0.1, 0.05), (0.4, 0.1), (0.9, 0.0)])
@pytest.mark.parametrize("count", [10, 40])
def test_the_interval_of_a_difference_of_shares_covers_it(better: float, worse: float, count: int) -> None:
    """Over 2,000 evaluations of few prompts; Student's interval covers 33 % of the time where 2 % of 20 prompts get better."""
    rng = Random(0)
    held = 0
    for _ in range(2000):
        drawn = rng.choices([1, -1, 0], [better, worse, 1 - better - worse], k=count)
        low, high = paired_shares_interval(drawn)
        held += low <= better - worse <= high
    assert held / 2000 >= 0.95 - 0.02


def test_wilsons_interval_by_hand() -> None:
    """Its ends p solve (p̂ − p)² = z² p(1−p)/n: 1 of 10 gives 0.0179 to 0.4042 (Newcombe 1998 prints such values)."""
    low, high = wilson_interval(0.1, 10)
    assert (low, high) == pytest.approx((0.017876, 0.404150), abs=1e-6)
    for end in (low, high):
        assert (0.1 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 10, rel=1e-5)
    assert wilson_interval(0.0, 5)[0] == 0 and wilson_interval(1.0, 5)[1] == 1


def test_a_share_of_zeros_and_ones_has_wilsons_interval_of_as_many_trials() -> None:
    found = share_estimate([1, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    assert (found.low, found.high) == pytest.approx(wilson_interval(0.1, 10))
    assert found.error == pytest.approx(stdev([1] + [0] * 9) / math.sqrt(10))


def test_completions_of_one_prompt_count_as_trials_only_as_far_as_they_differ() -> None:
    """Prompts that are all right or all wrong are as many trials as prompts; equal shares of 8 are as many as completions."""
    alike = share_estimate([1, 1, 0, 0], trials=32)
    assert (alike.low, alike.high) == pytest.approx(wilson_interval(0.5, 4))
    apart = share_estimate([0.5, 0.5, 0.5, 0.5], trials=32)
    assert (apart.low, apart.high) == pytest.approx(wilson_interval(0.5, 32)) and apart.error == 0
    sure = share_estimate([1.0, 1.0, 1.0], trials=24)
    assert (sure.low, sure.high) == pytest.approx(wilson_interval(1.0, 3))


@given(SHARES, st.integers(1, 16))
def test_an_interval_of_a_share_stays_in_the_unit_interval_and_mirrors(values: list[float], each: int) -> None:
    found, mirror = (share_estimate(v, trials=each * len(v)) for v in (values, [1 - value for value in values]))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (1 - mirror.low, 1 - mirror.high) == pytest.approx((found.high, found.low))


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 6)), min_size=1, max_size=12).filter(
        lambda c: any(n for _, n in c)
    )
)
def test_a_ratio_leaves_empty_clusters_out(clusters: list[tuple[float, int]]) -> None:
    full = [(total, n) for total, n in clusters if n]
    found = ratio_estimate([total for total, _ in clusters], [n for _, n in clusters])
    assert found == ratio_estimate([total for total, _ in full], [n for _, n in full])
    assert found.value == pytest.approx(sum(t for t, _ in full) / sum(n for _, n in full))


def test_the_bootstrap_of_a_mean_agrees_with_all_resamples() -> None:
    """Of three values there are 27 resamples: the standard deviation of their means, and their extremes, are known."""
    values = [0.0, 1.0, 5.0]
    means = [fmean(choice) for choice in itertools.product(values, repeat=3)]
    exact = math.sqrt(fmean((mean - 2) ** 2 for mean in means))
    found = bootstrap_estimate(lambda units: fmean(values[i] for i in units), 3, resamples=20_000)
    assert found.error == pytest.approx(exact, rel=0.02)
    assert found.value == 2 and (found.low, found.high) == (0, 5)
    assert found == bootstrap_estimate(lambda units: fmean(values[i] for i in units), 3, resamples=20_000)


def coverage(
    draw: Callable[[Random], Sequence[float]], measure: Callable[[Sequence[float]], Estimate], true: float
) -> float:
    """Return how often the interval of 2,000 repeated measurements holds the true value."""
    random = Random(0)
    found = [measure(draw(random)) for _ in range(2000)]
    return fmean(one.low <= true <= one.high for one in found)


@pytest.mark.parametrize(("share", "prompts"), [(0.02, 50), (0.3, 30), (0.5, 12), (0.97, 100)])
def test_shares_are_covered(share: float, prompts: int) -> None:
    """Wilson's coverage is within 3.5 points of 95 % down to np = 1; the usual interval's at share 0.02 of 50 is 63 %."""
    found = coverage(lambda random: [float(random.random() < share) for _ in range(prompts)], share_estimate, share)
    assert found == pytest.approx(0.95, abs=0.035)


def test_shares_of_several_completions_per_prompt_are_covered() -> None:
    """Prompts whose solve rates differ (uniform, mean a half): completions of one prompt are not independent."""

    def draw(random: Random) -> list[float]:
        rates = [random.random() for _ in range(40)]
        return [fmean(random.random() < rate for _ in range(8)) for rate in rates]

    clustered = coverage(draw, lambda values: share_estimate(values, trials=320), 0.5)
    assert clustered == pytest.approx(0.95, abs=0.02)
    naive = coverage(draw, lambda v: Estimate(fmean(v), None, 320, *wilson_interval(fmean(v), 320)), 0.5)
    assert naive < 0.75


def test_means_are_covered() -> None:
    found = coverage(lambda random: [random.gauss(3, 2) for _ in range(6)], mean_estimate, 3.0)
    assert found == pytest.approx(0.95, abs=0.015)


@given(SHARES)
def test_an_estimate_comes_back_from_json(values: list[float]) -> None:
    for found in (share_estimate(values), mean_estimate(values)):
        assert Estimate.from_json(json.loads(json.dumps(found.as_json()))) == found


@pytest.mark.parametrize(
    "values",
    [
        {"value": math.nan}, {"error": -1.0}, {"count": 0}, {"low": 0.0}, {"low": 2.0, "high": 3.0}, {"high": math.inf, "low": 0},
    ],
)  # fmt: skip
def test_an_estimate_refuses_what_has_no_meaning(values: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Estimate(**({"value": 1.0, "error": None, "count": 3} | values))


@pytest.mark.parametrize("change", [{"count": 2.0}, {"count": True}, {"value": None}, {"error": "0.1"}, {"more": 1}])
def test_an_estimate_is_not_read_from_other_json(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Estimate.from_json(mean_estimate([1, 2]).as_json() | change)
