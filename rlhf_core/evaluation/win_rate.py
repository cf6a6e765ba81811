"""How often one model's completion is preferred to another's: pairs by score, and the rate at equal length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_core.evaluation.estimate import LEVEL, Estimate, student_quantile

_PRIOR = 0.01
"""Inverse variance of the Gaussian prior on the coefficients: a standard deviation of 10, in log-odds."""


def preferences(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return for each score against each of the others 1 where it is higher, 0.5 where it is equal, else 0.

    The mean over all pairs is an unbiased estimate of P(own > other) + P(tie)/2 for two new completions (Mann and Whitney 1947).

    Args:
        scores: (n,) of one model's completions. others: (m,) of the other's, for the same prompt.

    Returns:
        (n · m,), the pairs of the first score first.
    """
    return [0.5 * ((own > other) + (own >= other)) for own in scores for other in others]


def length_controlled_win_rate(pairs: Sequence[Sequence[tuple[float, float]]]) -> Estimate:
    """Return the win rate that a logistic regression predicts where both completions have the same length.

    Dubois et al. 2024 (arXiv 2404.04475), section 3: P(own is preferred) = σ(θ + φ tanh(d / s)), with d the difference of the
    lengths and s its standard deviation, is fitted by cross-entropy to preferences in [0, 1]; the rate is σ(θ). Its error is that
    of θ between prompts (the sandwich estimator of Liang and Zeger 1986, s taken as known), its interval Student's for θ.

    Deviations: there is no term of an instruction's difficulty, which is fitted over many models and can't be from two. Both
    coefficients have a Gaussian prior of standard deviation 10, which keeps them finite where length separates wins from losses.

    Args:
        pairs: for each prompt its pairs: (preference in [0, 1], by how much the own completion is longer, in any unit). A prompt
            counts as one, however many pairs it has.

    Raises:
        ValueError: the differences are all equal and not 0, so that length and model can't be told apart.
    """
    count = len(pairs)
    owner = np.repeat(np.arange(count), [len(of) for of in pairs])
    wins, d = np.array([pair for of in pairs for pair in of], dtype=float).reshape(-1, 2).T  # (N,) each
    share = 1 / np.array([len(of) for of in pairs], dtype=float)[owner]
    middle = float(np.average(d, weights=share))
    spread = float(np.sqrt(np.average((d - middle) ** 2, weights=share)))
    if spread == 0 and middle != 0:
        raise ValueError("the differences of lengths are all equal, so that length and model can't be told apart")
    features = np.stack([np.ones_like(d), np.tanh(d / spread) if spread else np.zeros_like(d)], axis=1)  # (N, 2)
    at = _fit(features, wins, share)
    rate = _sigmoid(at[0])
    if count < 3:
        return Estimate(rate, None, count)
    chance = _sigmoid_of(features @ at)
    slopes = (share * (wins - chance))[:, None] * features
    by_prompt = np.stack([np.bincount(owner, column, minlength=count) for column in slopes.T], axis=1)  # (P, 2)
    inverse = np.linalg.inv(_curvature(features, chance, share))
    error = float(np.sqrt((inverse @ by_prompt.T @ by_prompt @ inverse)[0, 0] * count / (count - 1)))
    width = student_quantile((1 + LEVEL) / 2, count - 2) * error
    low, high = _sigmoid(at[0] - width), _sigmoid(at[0] + width)
    return Estimate(rate, rate * (1 - rate) * error, count, low, high)


def _fit(features: NDArray[np.float64], wins: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coefficients (2,) of a logistic regression, by Newton's method with halved steps where they don't improve."""
    at = np.zeros(features.shape[1])
    best = _objective(at, features, wins, share)
    for _ in range(100):
        chance = _sigmoid_of(features @ at)
        slope = features.T @ (share * (wins - chance)) - _PRIOR * at
        step = np.linalg.solve(_curvature(features, chance, share), slope)
        size = 1.0
        while size > 1e-10 and (now := _objective(at + size * step, features, wins, share)) < best:
            size /= 2
        if size <= 1e-10 or np.abs(size * step).max() < 1e-10:
            return at
        at, best = at + size * step, now
    return at


def _curvature(
    features: NDArray[np.float64], chance: NDArray[np.float64], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the negative second derivative (2, 2) of the objective where pairs are won with these chances (N,)."""
    return features.T @ (features * (share * chance * (1 - chance))[:, None]) + _PRIOR * np.eye(features.shape[1])


def _objective(
    at: NDArray[np.float64], features: NDArray[np.float64], wins: NDArray[np.float64], share: NDArray[np.float64]
) -> float:
    """Return the log-likelihood with the prior, up to a constant."""
    logits = features @ at
    return float((share * (wins * logits - np.logaddexp(0, logits))).sum() - _PRIOR * (at @ at) / 2)


def _sigmoid_of(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -logits))


def _sigmoid(logit: float) -> float:
    return float(_sigmoid_of(np.asarray(logit)))
