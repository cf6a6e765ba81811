"""Votes of several completions of a prompt: how often the majority of k is right, estimated without bias."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from rlhf_core.rewards.answer_votes import tally


def majority_at_k(keys: Sequence[Hashable | None], right: Sequence[float], k: int) -> float:
    """Return the probability that the majority vote of k of a prompt's completions is right: the mean over all C(n, k) subsets.

    The vote is that of self-consistency (Wang et al. 2022, arXiv 2203.11171): the answer that most of the k completions give; of
    several, each is as likely, as where the one that was given first wins. Completions without an answer have no vote, and a
    subset without any answer is wrong. The mean over all subsets is an unbiased estimate for k new completions (a U-statistic,
    as pass@k of Chen et al. 2021 is). It isn't sampled: answer a wins with j votes in

        C(c_a, j) · Σ_t [x^(k−j) y^t] Π_(b≠a) (Σ_(i<j) C(c_b, i) xⁱ + C(c_b, j) xʲ y) / (1 + t)

    of the subsets, with c_b completions that answer b, and t the answers that draw level.

    Args:
        keys: (n,) each completion's `answer_key`; None for one without an answer.
        right: (n,) whether each is right, 0 or 1. Where completions of one answer differ in it, the answer counts as their mean.
        k: completions that vote, 1 … n.

    Raises:
        ValueError: k isn't in 1 … n, or there is another number of keys.
    """
    n = len(keys)
    if not 1 <= k <= n or len(right) != n:
        raise ValueError(f"majority@{k} can't be estimated from {n} completions and {len(right)} marks")
    counts = {key: int(votes) for key, votes in tally(keys).items()}
    silent = n - sum(counts.values())
    wins = {count: _wins(sorted(counts.values()), count, silent, k, n) for count in set(counts.values())}
    marks = {key: fmean(mark for own, mark in zip(keys, right, strict=True) if own == key) for key in counts}
    return min(1.0, math.fsum(marks[key] * wins[count] for key, count in counts.items()) / _chance(n, k, k / n))


def _wins(counts: Sequence[int], own: int, silent: int, k: int, n: int) -> float:
    """Return the probability that an answer wins among exactly k completions, each of which is chosen with probability k/n.

    Divided by the probability that k are chosen, it is the share of subsets that the answer wins, draws counting in parts; the
    binomial coefficients alone would leave the range of floats.

    Args:
        counts: of all answers. own: that of the answer, one of them. silent: completions without an answer.
    """
    share, total = k / n, 0.0
    others = list(counts)
    others.remove(own)
    for votes in range(1, min(own, k) + 1):
        level = k // votes - 1  # most others that can have as many
        # chances[t, s]: that the others have s votes in all, t of them drawing level.
        chances = np.zeros((level + 1, k - votes + 1))
        chances[0, 0] = 1
        for count in others:
            chances = _with_answer(chances, count, votes, share)
        chances = _with_answer(chances, silent, silent + 1, share)
        draws = chances[:, k - votes] / (1 + np.arange(level + 1))
        total += _chance(own, votes, share) * float(draws.sum())
    return total


def _with_answer(chances: NDArray[np.float64], count: int, votes: int, share: float) -> NDArray[np.float64]:
    """Return the chances with one more answer, that `count` completions give and that has at most `votes` among the chosen."""
    found = chances * _chance(count, 0, share)
    width = chances.shape[1]
    for own in range(1, min(count, votes, width - 1) + 1):
        more = _chance(count, own, share) * chances[:, : width - own]
        if own < votes:
            found[:, own:] += more
        else:
            found[1:, own:] += more[:-1]
    return found


def _chance(count: int, chosen: int, share: float) -> float:
    """Return the binomial probability C(count, chosen) share^chosen (1 − share)^(count − chosen)."""
    if share == 1:
        return float(chosen == count)
    ways = math.lgamma(count + 1) - math.lgamma(chosen + 1) - math.lgamma(count - chosen + 1)
    return math.exp(ways + chosen * math.log(share) + (count - chosen) * math.log1p(-share))
