"""Whether confidence agrees with correctness: reliability by bins, expected calibration error, Brier score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

Floats = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions whose confidence is in [low, high), the last bin's in [low, 1]."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean confidence."""
    accuracy: float
    """Share that is right."""


def reliability(confidence: Sequence[float], right: Sequence[float], bins: int = 10) -> list[ReliabilityBin]:
    """Return the bins of equal width that hold a prediction, lowest confidence first.

    Args:
        confidence: (N,) in [0, 1]. right: (N,) 0 or 1.

    Raises:
        ValueError: a confidence is outside [0, 1], or the lengths differ.
    """
    if not all(0 <= one <= 1 for one in confidence):
        raise ValueError("a confidence is a probability, 0 to 1")
    members: dict[int, list[tuple[float, float]]] = {}
    for sure, mark in zip(confidence, right, strict=True):
        members.setdefault(min(int(sure * bins), bins - 1), []).append((sure, mark))
    return [
        ReliabilityBin(number / bins, (number + 1) / bins, len(of_bin), *map(fmean, zip(*of_bin, strict=True)))
        for number, of_bin in sorted(members.items())
    ]


def expected_calibration_error(
    confidence: Floats, right: Floats, bins: int = 10, *, weights: Floats | None = None
) -> float:
    """Return Σ_b (n_b / N) |accuracy_b − confidence_b| over bins of equal width, in [0, 1].

    Guo et al. 2017 (arXiv 1706.04599), equation 3. Of few predictions it is too large even where they are calibrated, for each
    bin's accuracy is noisy. (`calibration_error` has bins of equal size, which cut through equal confidences, such as shares of
    votes.)

    Args:
        confidence: (N,) in [0, 1]. right: (N,) 0 or 1.
        weights: (N,) how much each prediction counts; None: equally.
    """
    sure, mark = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    share = np.ones_like(sure) if weights is None else np.asarray(weights, dtype=float)
    at = np.minimum((sure * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(at, share * (mark - sure))).sum() / share.sum())


def brier_score(confidence: Sequence[float], right: Sequence[float]) -> float:
    """Return the mean of (confidence − right)², in [0, 1] (Brier 1950, for two outcomes); smaller is better."""
    return fmean((sure - mark) ** 2 for sure, mark in zip(confidence, right, strict=True))
