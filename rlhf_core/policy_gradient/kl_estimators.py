"""Estimates of KL(π ‖ π_ref) per token, from the log-probabilities of sampled tokens (Schulman 2020, "Approximating KL
divergence").

Every function takes log π (R, T), with gradient, and log π_ref (R, T) of the sampled tokens, nats, and returns an estimate
for each, (R, T). With `log_ratio`, log ρ = log π − log π_old (R, T) with gradient, the estimate is weighted by ρ = π/π_old
such that its gradient, averaged over tokens that π_old sampled, is that of KL(π ‖ π_ref); x = log π − log π_ref.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.policy_gradient.part_table import PartTable

KL_ESTIMATORS = PartTable(
    "kl",
    "Estimate of the KL to the reference: `k1`, `k2`, `k3`.",
)
"""Functions from log-probabilities of the policy and the reference (R, T) to estimates of the KL (R, T)."""

_LARGEST = 20.0
"""Differences of log-probabilities count as at most this, nats: e²⁰ is beyond any divergence that a run survives."""


@KL_ESTIMATORS.own
def k1(logps: Tensor, ref_logps: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """Return x, or ρx: unbiased, of either sign.

    Without `log_ratio` its gradient is 0 on average, so in a loss it wants one; in a reward it needs none.
    """
    return _weight(log_ratio) * (logps - ref_logps)


@KL_ESTIMATORS.own
def k2(logps: Tensor, ref_logps: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """Return x²/2, or sg(ρ)x²/2, sg without gradient: biased in value, its gradient is that of the KL."""
    return _weight(log_ratio).detach() * (logps - ref_logps).square() / 2


@KL_ESTIMATORS.own
def k3(logps: Tensor, ref_logps: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """Return e^−x − 1 + x, or ρ(e^−x − 1 + x): unbiased and never negative; GRPO's (Shao et al. 2024, arXiv 2402.03300,
    equation 4).

    Without `log_ratio` its gradient is that of KL(π_ref ‖ π); with it, as in DeepSeek-V3.2 (arXiv 2512.02556), of KL(π ‖
    π_ref).
    """
    back = (ref_logps - logps).clamp(max=_LARGEST)
    return _weight(log_ratio) * (torch.expm1(back) - back)


def _weight(log_ratio: Tensor | None) -> Tensor:
    """Return ρ, with gradient; 1 without a log-ratio."""
    return torch.ones(()) if log_ratio is None else log_ratio.clamp(max=_LARGEST).exp()
