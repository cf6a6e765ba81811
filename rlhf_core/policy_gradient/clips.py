"""Clips: the objective of each token, from its ratio and advantage, held near the policy that sampled it.

Every function takes `PolicyTerms` and returns the objective (R, T) to be maximised, with gradient. ρ is the ratio, A the
advantage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.policy_gradient.part_table import PartTable

CLIPS = PartTable(
    "clip",
    "The objective per token, held near the policy that sampled: `ppo`, `two_sided`, `cispo`, `sapo`, `none` …",
)
"""Functions from `PolicyTerms` to objectives (R, T)."""

_LARGEST_LOG_RATIO = 20.0
"""Beyond it a ratio counts as e²⁰, so that the product with a gradient of 0 is never that of 0 and infinity."""

Below = Annotated[float, Field(gt=0, le=1)]
Above = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class PolicyTerms:
    """What a clip sees of R completions of at most T tokens. Log-probabilities are at the temperature of sampling, nats."""

    logps: Tensor
    """(R, T) log π of each token, with gradient."""
    old_logps: Tensor
    """(R, T) log π_old, of the policy that the ratio is taken to."""
    log_ratio: Tensor
    """(R, T) logarithm of the ratio as a part of `RATIOS` made it, with gradient, 0 outside the mask."""
    advantages: Tensor
    """(R, T) A."""
    mask: Tensor
    """(R, T) bool: tokens in the loss."""

    @property
    def ratio(self) -> Tensor:
        """(R, T) ρ, with gradient."""
        return self.log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()


@CLIPS.own
def none(terms: PolicyTerms) -> Tensor:
    """Return ρA, not clipped: the importance-weighted policy gradient (Schulman et al. 2017, arXiv 1707.06347, equation 6)."""
    return terms.ratio * terms.advantages


@CLIPS.own
def ppo(terms: PolicyTerms, *, low: Below = 0.2, high: Above = 0.2) -> Tensor:
    """Return min(ρA, clip(ρ, 1 − low, 1 + high) A): PPO (Schulman et al. 2017, arXiv 1707.06347, equation 7); with two bounds
    DAPO's (Yu et al. 2025, arXiv 2503.14476, equation 10).

    Args:
        low, high: how far the ratio may fall and rise; larger trusts old rollouts more.
    """
    ratio, advantages = terms.ratio, terms.advantages
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


@CLIPS.own
def two_sided(
    terms: PolicyTerms, *, low: Below = 0.2, high: Above = 0.2, ceiling: Annotated[float, Field(gt=1)] = 3.0
) -> Tensor:
    """Return `ppo`, and for A < 0 no less than ceiling · A: dual-clip PPO (Ye et al. 2020, arXiv 1912.09729).

    Args:
        low, high: as of `ppo`.
        ceiling: largest ratio with which a negative advantage counts; larger lets more of an unlikely token through.
    """
    clipped = ppo(terms, low=low, high=high)
    return torch.where(terms.advantages < 0, torch.maximum(clipped, ceiling * terms.advantages), clipped)


@CLIPS.own
def cispo(terms: PolicyTerms, *, low: Below | None = None, high: Above = 4.0) -> Tensor:
    """Return sg(clip(ρ, 1 − low, 1 + high)) A log π, sg without gradient: CISPO (MiniMax 2025, arXiv 2506.13585, equations 4
    and 5).

    Every token keeps a gradient. The paper sets no lower bound and doesn't state the upper one: a largest weight of 5 is
    that of Khatri et al. 2025 (arXiv 2510.13786).

    Args:
        low, high: how far the weight may fall and rise; null low is no bound.
    """
    lowest = 0.0 if low is None else 1 - low
    return terms.ratio.detach().clamp(lowest, 1 + high) * terms.advantages * terms.logps


@CLIPS.own
def sapo(terms: PolicyTerms, *, tau_positive: Above = 1.0, tau_negative: Above = 1.05) -> Tensor:
    """Return 4/τ σ(τ(ρ − 1)) A, a gate instead of bounds: SAPO (Gao et al. 2025, arXiv 2511.20347), with the paper's τ.

    At ρ = 1 its gradient is that of ρA.

    Args:
        tau_positive, tau_negative: τ where A > 0, and elsewhere; larger closes the gate sooner.
    """
    tau = torch.full_like(terms.advantages, tau_negative).masked_fill(terms.advantages > 0, tau_positive)
    return torch.sigmoid(tau * (terms.ratio - 1)) * 4 / tau * terms.advantages


@CLIPS.own
def gmpo(terms: PolicyTerms, *, low: Above = 0.4, high: Above = 0.4) -> Tensor:
    """Return A Π_t ρ_t^(1/|o|) for each token of a completion o, each log ρ_t held within [−low, high] where it would gain from
    leaving that: GMPO (Zhao et al. 2025, arXiv 2507.20673).

    It wants ratios per token and the aggregation `sequence_mean`. The bounds are of logarithms: (e^−0.4, e^0.4) in the paper.

    Args:
        low, high: how far a token's log-ratio may fall and rise; larger trusts old rollouts more.
    """
    log_ratio, advantages, mask = terms.log_ratio, terms.advantages, terms.mask
    held = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    mean = (held * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.clamp(max=_LARGEST_LOG_RATIO).exp() * advantages


@CLIPS.own
def dppo(
    terms: PolicyTerms,
    *,
    divergence: Literal["tv", "kl"] = "tv",
    low: Annotated[float, Field(gt=0)] | None = None,
    high: Annotated[float, Field(gt=0)] | None = None,
) -> Tensor:
    """Return ρA, and 0 where the token's probability has moved too far and A would move it further: DPPO (Qi et al. 2026, arXiv
    2602.04879), with its binary divergences.

    D is between the distributions "this token or another" of π_old and π: |π − π_old| (`tv`), or
    π_old log(π_old/π) + (1 − π_old) log((1 − π_old)/(1 − π)) (`kl`). A token is left out where A > 0, ρ > 1 and D > high, or
    where A < 0, ρ < 1 and D > low. A rare token may then rise by a large factor, and a frequent one not by a large amount.

    Args:
        divergence: how the distance is measured.
        low, high: how far a probability may fall and rise; larger trusts old rollouts more. Null is the authors' choice:
            0.15 for `tv`, 0.05 for `kl`.
    """
    usual = 0.15 if divergence == "tv" else 0.05
    low, high = usual if low is None else low, usual if high is None else high
    new, old = terms.logps.detach().exp().clamp(max=1.0), terms.old_logps.exp().clamp(max=1.0)
    if divergence == "tv":
        distance = (new - old).abs()
    else:
        rest_new, rest_old = (1 - new).clamp(min=1e-12), (1 - old).clamp(min=1e-12)
        distance = old * (terms.old_logps - terms.logps.detach()) + rest_old * (rest_old.log() - rest_new.log())
    up = (terms.advantages > 0) & (new > old) & (distance > high)
    down = (terms.advantages < 0) & (new < old) & (distance > low)
    return terms.ratio * terms.advantages * ~(up | down)


def clipped_tokens(clip: Callable[[PolicyTerms], Tensor], terms: PolicyTerms) -> Tensor:
    """Return (R, T) which tokens in the loss a clip holds back: those whose advantage isn't 0, yet the objective has no
    gradient.

    Args:
        clip: a part of `CLIPS` with its options set.
    """
    with torch.enable_grad():
        logps = terms.logps.detach().requires_grad_()
        log_ratio = terms.log_ratio.detach().requires_grad_()
        objective = clip(replace(terms, logps=logps, log_ratio=log_ratio))
        if not objective.requires_grad:
            return terms.mask & (terms.advantages != 0)
        found = torch.autograd.grad(objective.sum(), (logps, log_ratio), allow_unused=True)
    still = torch.ones_like(terms.mask)
    for gradient in found:
        if gradient is not None:
            still = still & (gradient == 0)
    return still & terms.mask & (terms.advantages != 0)
