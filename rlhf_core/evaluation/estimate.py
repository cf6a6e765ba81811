"""A number measured over prompts or rows, with its standard error and an interval: `Estimate`, and the ways to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from statistics import NormalDist, fmean
from typing import Any

from rlhf_core.infra.statistics import ratio_standard_error, standard_error

LEVEL = 0.95
"""Coverage of the intervals: in this share of repeated measurements they hold the true value."""
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_KEYS = ("value", "error", "count", "low", "high")


@dataclass(frozen=True)
class Estimate:
    """A measured number, in the unit of what was measured.

    Raises:
        ValueError: a number isn't finite, the error is negative, the count isn't positive, or the interval has one end
            or excludes the value.
    """

    value: float
    error: float | None
    """Standard error of `value`; None where there are too few units to tell."""
    count: int
    """Independent units that it was measured over: prompts or rows."""
    low: float | None = None
    """Lower end of the 95 % interval; None where there is none."""
    high: float | None = None
    """Upper end of the 95 % interval."""

    def __post_init__(self) -> None:
        numbers = [one for one in (self.value, self.error, self.low, self.high) if one is not None]
        if not all(math.isfinite(one) for one in numbers):
            raise ValueError(f"an estimate must be finite: {self}")
        if (self.error is not None and self.error < 0) or self.count < 1:
            raise ValueError(f"an estimate needs a positive count and no negative error: {self}")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"an interval needs both of its ends: {self}")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise ValueError(f"an interval must hold its value: {self}")

    def __str__(self) -> str:
        text = f"{self.value:.4g}"
        text += "" if self.error is None else f" ± {self.error:.2g}"
        return text if self.low is None or self.high is None else f"{text} [{self.low:.4g}, {self.high:.4g}]"

    def as_json(self) -> dict[str, float | int | None]:
        """Return JSON values under the names of the fields."""
        return {name: getattr(self, name) for name in _KEYS}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Estimate:
        """Return the estimate that `as_json` wrote.

        Raises:
            ValueError: a key is missing or unknown, or a value isn't a number.
        """
        if values.keys() != set(_KEYS):
            raise ValueError(f"an estimate has the keys {', '.join(_KEYS)}; got {', '.join(map(str, values))}")
        if type(values["count"]) is not int:
            raise ValueError(f"an estimate's count must be a whole number; got {values['count']!r}")
        for name in ("value", "error", "low", "high"):
            value = values[name]
            if type(value) not in (int, float) and not (value is None and name != "value"):
                raise ValueError(f"an estimate's {name} must be a number; got {value!r}")
        return cls(**values)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with Student's interval, x̄ ± t₍n−1₎ s/√n; for one value without error.

    For values of any distribution the interval is right in the limit of many; for shares use `share_estimate`, whose
    interval keeps its coverage near 0 and 1.
    """
    mean, error = fmean(values), standard_error(values)
    if error is None:
        return Estimate(mean, None, len(values))
    width = student_quantile((1 + LEVEL) / 2, len(values) - 1) * error
    return Estimate(mean, error, len(values), mean - width, mean + width)


def share_estimate(values: Sequence[float], *, trials: int | None = None) -> Estimate:
    """Return the mean of independent values in [0, 1] with Wilson's interval (Wilson 1927), which is never empty.

    Values of 0 and 1 are n Bernoulli trials. Means of several trials each, such as the share of right completions of a
    prompt, vary less: then n is the effective number of trials, p(1−p)/s², with s the standard error between the values
    (Kish 1965; Korn and Graubard 1998 for its use in a binomial interval; Dean and Pagano 2015 for Wilson's), at least
    the number of values (which it is at p = 0 and 1, where nothing shows how alike the trials are) and at most `trials`.
    The standard error is that between the values, s.

    Args:
        values: (P,) one per prompt.
        trials: Bernoulli trials in all; None takes one per value.

    Raises:
        ValueError: a value is outside [0, 1], there is none, or there are fewer trials than values.
    """
    count = len(values)
    trials = count if trials is None else trials
    if not count or not all(0 <= value <= 1 for value in values) or trials < count:
        raise ValueError(f"a share is the mean of values in [0, 1], one or more trials each; got {count} of {trials}")
    mean, error = min(1.0, max(0.0, fmean(values))), standard_error(values)
    effective = float(count)
    if 0 < mean < 1 and error is not None:
        effective = min(float(trials), max(float(count), mean * (1 - mean) / error**2 if error else math.inf))
    low, high = wilson_interval(mean, effective)
    return Estimate(mean, error, count, low, high)


def wilson_interval(share: float, trials: float) -> tuple[float, float]:
    """Return the 95 % interval of a binomial share by inverting the score test.

    Wilson 1927 ("Probable inference, the law of succession, and statistical inference"):
    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        share: p, in [0, 1]. trials: n > 0, also an effective number.
    """
    middle = share + _Z**2 / (2 * trials)
    width = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    scale = 1 + _Z**2 / trials
    # Rounding must not take the ends past the share, which they touch at 0 and 1.
    return max(0.0, min(share, (middle - width) / scale)), min(1.0, max(share, (middle + width) / scale))


def ratio_estimate(totals: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Return Σ totals / Σ counts over independent clusters, such as nats per token over prompts, with Student's interval.

    The standard error is that of `ratio_standard_error`; clusters without a count are left out.

    Raises:
        ValueError: no cluster has a count.
    """
    clusters = [(total, count) for total, count in zip(totals, counts, strict=True) if count]
    if not clusters:
        raise ValueError("a ratio needs a cluster with a count")
    ratio = math.fsum(total for total, _ in clusters) / math.fsum(count for _, count in clusters)
    error = ratio_standard_error(clusters)
    if error is None:
        return Estimate(ratio, None, len(clusters))
    width = student_quantile((1 + LEVEL) / 2, len(clusters) - 1) * error
    return Estimate(ratio, error, len(clusters), ratio - width, ratio + width)


def bootstrap_estimate(
    statistic: Callable[[Sequence[int]], float], count: int, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Return a statistic of `count` independent units with its bootstrap standard error and percentile interval.

    Efron 1979 ("Bootstrap methods: another look at the jackknife"); Efron and Tibshirani 1993, chapter 13. The interval
    is widened to the value where a biased statistic leaves it outside.

    Args:
        statistic: gets the numbers of units, drawn with replacement, and returns the statistic of those.
        count: units: 0 … count − 1 are drawn.
        resamples: how many draws; more make error and interval themselves more precise.
    """
    value = statistic(range(count))
    if count < 2:
        return Estimate(value, None, count)
    random = Random(seed)
    drawn = sorted(statistic(random.choices(range(count), k=count)) for _ in range(resamples))
    middle = fmean(drawn)
    error = math.sqrt(math.fsum((one - middle) ** 2 for one in drawn) / (resamples - 1))
    outside = math.floor((1 - LEVEL) / 2 * resamples)
    low, high = drawn[outside], drawn[-1 - outside]
    return Estimate(value, error, count, min(low, value), max(high, value))


def ratio_difference(
    before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], *, shares: bool = False
) -> Estimate:
    """Return Σ s₁/Σ n₁ − Σ s₀/Σ n₀ for clusters (s, n) that were measured twice, with a paired standard error.

    √( C/(C−1) · Σ_c ( (s₁ − r₁n₁)/N₁ − (s₀ − r₀n₀)/N₀ )² ): the linearised variance of a difference of two ratios over the same
    clusters (Cochran 1977, section 6.3). With counts of 1 all is as of `paired_difference`.

    Args:
        before: (C,) s₀ and n₀ of each cluster. after: (C,) s₁ and n₁. shares: whether each s/n is a share, in [0, 1].

    Raises:
        ValueError: a measurement has no count, or they are of different numbers of clusters.
    """
    both = list(zip(before, after, strict=True))
    sums = [[math.fsum(cluster[part] for cluster in of) for part in (0, 1)] for of in (before, after)]
    if not all(count > 0 for _, count in sums):
        raise ValueError("a ratio needs a cluster with a count")
    (old, old_count), (new, new_count) = ((total / count, count) for total, count in sums)
    if all(n == 1 for pair in both for _, n in pair):
        return paired_difference([s for (s, _), _ in both], [s for _, (s, _) in both], shares=shares)
    if len(both) < 2:
        return Estimate(new - old, None, len(both))
    apart = [(s1 - new * n1) / new_count - (s0 - old * n0) / old_count for (s0, n0), (s1, n1) in both]
    error = math.sqrt(len(both) / (len(both) - 1) * math.fsum(one**2 for one in apart))
    width = student_quantile((1 + LEVEL) / 2, len(both) - 1) * error
    return Estimate(new - old, error, len(both), new - old - width, new - old + width)


def paired_difference(before: Sequence[float], after: Sequence[float], *, shares: bool = False) -> Estimate:
    """Return the mean of after − before over the same prompts, with the standard error of paired differences.

    The interval is Student's. Of shares it is that of `paired_shares_interval` where each is 0 or 1, or all differ alike: there
    Student's is too narrow, or empty.

    Args:
        before: (P,) each prompt's value. after: (P,) likewise. shares: whether the values are shares, in [0, 1].
    """
    differences = [now - then for then, now in zip(before, after, strict=True)]
    found = mean_estimate(differences)
    alike = max(differences) - min(differences) < 1e-12  # but for rounding
    if not shares or len(differences) < 2 or not (alike or {*before, *after} <= {0, 1}):
        return found
    low, high = paired_shares_interval(differences)
    return replace(found, low=min(low, found.value), high=max(high, found.value))


def paired_shares_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of differences in [−1, 1] between pairs, which is never empty.

    Bonett and Price 2012 ("Adjusted Wald confidence interval for a difference of binomial proportions based on paired data"): a
    normal interval after two more pairs, of which one got better by 1 and one worse.

    Args:
        differences: (P,) after − before, one per pair; of pairs of 0 and 1 each is −1, 0 or 1.
    """
    pairs = len(differences) + 2
    mean = math.fsum(differences) / pairs
    square = (math.fsum(one**2 for one in differences) + 2) / pairs
    width = _Z * math.sqrt((square - mean**2) / pairs)
    return max(-1.0, mean - width), min(1.0, mean + width)


@cache
def student_quantile(share: float, freedom: int) -> float:
    """Return the quantile of Student's distribution, found by bisection of its distribution function.

    Beyond 1,000 degrees of freedom it is the normal quantile z with its first correction, z + z(z² + 1)/4ν (Abramowitz and
    Stegun 1964, 26.7.5), which is right to 3e-6.

    Args:
        share: in (0.5, 1): the probability below it. freedom: degrees of freedom, at least 1.
    """
    if not 0.5 < share < 1 or freedom < 1:
        raise ValueError(f"no quantile of Student's distribution at {share} with {freedom} degrees of freedom")
    if freedom > 1000:
        z = NormalDist().inv_cdf(share)
        return z + z * (z**2 + 1) / (4 * freedom)
    low, high = 0.0, 1.0
    while student_distribution(high, freedom) < share:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        if student_distribution(middle, freedom) < share:
            low = middle
        else:
            high = middle
    return high


def student_distribution(t: float, freedom: int) -> float:
    """Return the distribution function of Student's distribution at t ≥ 0, by its finite sums for whole degrees of freedom.

    Abramowitz and Stegun 1964, equations 26.7.3 and 26.7.4, with θ = arctan(t/√ν).
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    terms = [term] if freedom > 1 else []
    for k in range(1, (freedom - 1) // 2 if odd else freedom // 2):
        term *= squared * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
        terms.append(term)
    total = sine * math.fsum(terms)
    inside = 2 / math.pi * (angle + total) if odd else total
    return 0.5 + inside / 2
