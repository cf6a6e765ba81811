"""Statistics of held-out data that several methods report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def auc(higher: Tensor, lower: Tensor) -> float:
    """Return the area under the ROC curve: the share of pairs (one of each) with higher > lower, ties counting half.

    Args:
        higher: (N,) scores that should be the larger ones.
        lower: (M,) scores that should be the smaller ones.
    """
    ordered = lower.sort().values
    below = torch.searchsorted(ordered, higher, right=False) + torch.searchsorted(ordered, higher, right=True)
    return float(below.double().mean()) / (2 * len(lower))


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """Return the expected calibration error over bins of equal size: Σ_b (n_b / N) |accuracy_b − confidence_b|.

    Naeini et al. 2015 ("Obtaining well calibrated probabilities using Bayesian binning"); Nixon et al. 2019
    (arXiv 1904.01685) for bins of equal size, which don't depend on how scores are distributed.

    Args:
        confidence: (N,) probabilities that a prediction is right.
        right: (N,) bool, whether it was.
    """
    order = confidence.argsort()
    parts = zip(confidence[order].tensor_split(bins), right[order].double().tensor_split(bins), strict=True)
    gaps = [len(c) * (r.mean() - c.mean()).abs() for c, r in parts if len(c)]
    return float(torch.stack(gaps).sum()) / len(confidence)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error s/√N of the mean of independent values; None for fewer than two."""
    return ratio_standard_error([(value, 1.0) for value in values])


def ratio_standard_error(clusters: Sequence[tuple[float, float]]) -> float | None:
    """Return the standard error of Σ s_c / Σ n_c over independent clusters (s_c, n_c); None for fewer than two.

    √( C/(C−1) · Σ_c (s_c − r n_c)² ) / N with r = S/N: the linearised variance of a ratio of totals, between clusters
    (Cochran 1977, Sampling Techniques, section 6.3). With one row a cluster it is the usual s/√N.
    """
    clusters = [(total, count) for total, count in clusters if count]
    count = math.fsum(n for _, n in clusters)
    if len(clusters) < 2:
        return None
    ratio = math.fsum(s for s, _ in clusters) / count
    spread = math.fsum((s - ratio * n) ** 2 for s, n in clusters)
    return math.sqrt(len(clusters) / (len(clusters) - 1) * spread) / count
