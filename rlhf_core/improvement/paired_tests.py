"""Tests of whether paired values dropped: exact for right and wrong, by sign flips for grades; corrected for several tests.

All are one-sided: they ask whether `after` is below `before`, of the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, fsum

import numpy as np

from rlhf_core.infra.seeds import random_generator

EXACT = 16
"""Most differing pairs of which `sign_flip_test` tries all sign patterns, 2^16 of them."""
_TOGETHER = 2**22
"""Signs drawn at once."""


def mcnemar_test(losses: int, gains: int) -> float:
    """Return the exact one-sided p-value of McNemar's test: P(X ≥ losses) for X ~ Binomial(losses + gains, 1/2).

    McNemar 1947 ("Note on the sampling error of the difference between correlated proportions"), in its exact form, the sign test
    of the pairs that differ.

    Args:
        losses: prompts that were right before and are wrong after.
        gains: prompts that were wrong before and are right after.
    """
    count = losses + gains
    return sum(comb(count, k) for k in range(losses, count + 1)) / 2**count


def sign_flip_test(differences: Sequence[float], *, resamples: int = 20_000) -> float:
    """Return the one-sided p-value of a paired permutation test: the share of sign patterns whose sum is at least as low.

    Fisher 1935 ("The Design of Experiments"). If nothing changed, each difference is as likely to have the other sign. With at
    most `EXACT` differences that aren't 0 all patterns are tried; else `resamples` random ones, with the observed one counted in
    (Phipson & Smyth 2010, arXiv 1603.05766), so that the p-value is never 0 and the test keeps its level. The draws are the same
    in each call.

    Args:
        differences: (P,) value after less value before, per prompt.
    """
    values = np.asarray([one for one in differences if one], dtype=np.float64)
    count = len(values)
    if count == 0:
        return 1.0
    observed = fsum(values)
    # Sums of the same values in other orders may differ in their last bits, and must count as equal.
    limit = observed + 1e-9 * float(np.abs(values).sum())
    if count <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)  # (2^count, count)
        return float(np.mean(signs @ values <= limit))
    generator, hits, left = random_generator(count, resamples), 0, resamples
    while left:
        some = min(left, max(1, _TOGETHER // count))
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(some, count), dtype=np.int8)
        hits += int(np.count_nonzero(signs @ values <= limit))
        left -= some
    return (1 + hits) / (1 + resamples)


def right_or_wrong(*scores: Sequence[float]) -> bool:
    """Return whether all scores are 1 for right or 0 for wrong, and none is graded."""
    return all(one in (0, 1) for each in scores for one in each)


def paired_test(before: Sequence[float], after: Sequence[float], *, resamples: int = 20_000) -> tuple[str, float]:
    """Return the test that fits paired values, `mcnemar` or `sign_flip`, and its one-sided p-value for a drop."""
    if right_or_wrong(before, after):
        losses = sum(old > new for old, new in zip(before, after, strict=True))
        gains = sum(old < new for old, new in zip(before, after, strict=True))
        return "mcnemar", mcnemar_test(losses, gains)
    differences = [new - old for old, new in zip(before, after, strict=True)]
    return "sign_flip", sign_flip_test(differences, resamples=resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing several hypotheses: reject those at most alpha, and P(any false rejection) ≤ alpha.

    Holm 1979 ("A simple sequentially rejective multiple test procedure"): the i-th smallest of m, from 1, becomes the largest of
    (m - j + 1) p_(j) over j ≤ i, at most 1.
    """
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = most
    return adjusted
