"""Votes of several completions of a prompt: how often the majority of k is right, estimated without bias."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import fmean

import numpy as np

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
    wins = {count: _wins(sorted(counts.values()), count, silent, k) for count in set(counts.values())}
    marks = {key: fmean(mark for own, mark in zip(keys, right, strict=True) if own == key) for key in counts}
    return min(1.0, math.fsum(marks[key] * wins[count] for key, count in counts.items()) / math.comb(n, k))


def _wins(counts: list[int], own: int, silent: int, k: int) -> float:
    """Return in how many subsets of k completions an answer wins, draws counting in parts.

    Args:
        counts: of all answers. own: that of the answer, one of them. silent: completions without an answer.
    """
    others = list(counts)
    others.remove(own)
    total = 0.0
    for votes in range(1, min(own, k) + 1):
        level = k // votes - 1  # most others that can have as many
        # ways[t, s]: how many ways the others have s votes in all, t of them drawing level.
        ways = np.zeros((level + 1, k - votes + 1))
        ways[0, 0] = 1
        for count in others:
            ways = _with_answer(ways, count, votes)
        ways = _with_answer(ways, silent, silent + 1)
        total += math.comb(own, votes) * float((ways[:, k - votes] / (1 + np.arange(level + 1))).sum())
    return total


def _with_answer(ways: np.ndarray, count: int, votes: int) -> np.ndarray:
    """Return the ways with one more answer, that `count` completions give and that has at most `votes` in the subset."""
    found = ways.copy()
    width = ways.shape[1]
    for own in range(1, min(count, votes, width - 1) + 1):
        more = math.comb(count, own) * ways[:, : width - own]
        if own < votes:
            found[:, own:] += more
        else:
            found[1:, own:] += more[:-1]
    return found
