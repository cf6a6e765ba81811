"""Ratios: how much likelier the policy makes what was sampled than the policy that sampled it did.

Every function takes differences of log-probabilities, log π − log π_old (R, T), nats, 0 outside the mask, and the loss mask
(R, T), and returns the logarithm of the ratio for each token, (R, T), with gradient.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_core.policy_gradient.part_table import PartTable

RATIOS = PartTable(
    "ratio",
    "How the policy is compared with the one that sampled: by `token`, `sequence` or `geometric` mean …",
)
"""Functions from differences of log-probabilities (R, T) and the loss mask (R, T) to log-ratios (R, T)."""


@RATIOS.own
def token(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Return log ρ_t = log π(y_t) − log π_old(y_t), each token's own: PPO (Schulman et al. 2017, arXiv 1707.06347, equation
    6)."""
    return log_ratio


@RATIOS.own
def sequence(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Return log ρ = Σ_t log π(y_t) − log π_old(y_t), the completion's for each of its tokens: the completion as one action, as
    in RLOO (Ahmadian et al. 2024, arXiv 2402.14740, section 3.1)."""
    return (log_ratio * mask).sum(dim=1, keepdim=True).expand_as(log_ratio) * mask


@RATIOS.own
def geometric(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Return log s = mean_t log π(y_t) − log π_old(y_t), the completion's for each of its tokens: GSPO (Zheng et al. 2025,
    arXiv 2507.18071, equation 7)."""
    return sequence(log_ratio, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1)


@RATIOS.own
def geometric_token(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Return the value of `geometric` with the gradient of `token`: GSPO-token (arXiv 2507.18071, equation 14)."""
    return geometric(log_ratio, mask).detach() + (log_ratio - log_ratio.detach())
