"""Statistics of held-out data that several methods report."""

from __future__ import annotations

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
