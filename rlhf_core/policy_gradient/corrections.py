"""Corrections for completions that another policy sampled than the one that the trainer computes: another backend or precision.

Every function takes the trainer's log-probabilities of the sampled tokens by the weights that sampled them, (R, T), the
engine's (R, T), nats, and the loss mask (R, T), and returns a weight for each token, (R, T), without gradient. w =
π_trainer/π_engine.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.policy_gradient.part_table import PartTable

CORRECTIONS = PartTable(
    "correction",
    "Weights for a gap between the engine's and the trainer's log-probabilities: `token_truncated`, `icepop` …, which take one"
    " more forward pass of the policy; `none` takes none.",
)
"""Functions from the trainer's and the engine's log-probabilities (R, T) and the loss mask (R, T) to weights (R, T)."""

Bound = Annotated[float, Field(gt=0)]


@CORRECTIONS.own
def none(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor) -> Tensor:
    """Return 1 for each token: the engine is the policy that trains."""
    return torch.ones_like(trainer_logps)


@CORRECTIONS.own
def token_truncated(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor, *, cap: Bound = 2.0) -> Tensor:
    """Return min(w_t, cap) for each token: truncated importance sampling (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training").

    Args:
        cap: largest weight; larger corrects more, with more variance.
    """
    return _weights(trainer_logps, engine_logps, mask).clamp(max=cap)


@CORRECTIONS.own
def token_masked(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor, *, cap: Bound = 2.0) -> Tensor:
    """Return w_t, and 0 where it is above cap: masked importance sampling by token (Liu et al. 2025, "When speed kills
    stability").

    Args:
        cap: largest weight that is kept; larger keeps more tokens.
    """
    weights = _weights(trainer_logps, engine_logps, mask)
    return torch.where(weights <= cap, weights, 0.0)


@CORRECTIONS.own
def sequence_truncated(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor, *, cap: Bound = 2.0) -> Tensor:
    """Return min(Π_t w_t, cap) for each token of a completion: truncated importance sampling by sequence (Liu et al. 2025,
    "When speed kills stability").

    Args:
        cap: largest weight; larger corrects more, with more variance.
    """
    return _sequence_weights(trainer_logps, engine_logps, mask).clamp(max=cap)


@CORRECTIONS.own
def sequence_masked(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor, *, cap: Bound = 2.0) -> Tensor:
    """Return Π_t w_t for each token of a completion, and 0 where it is above cap: masked importance sampling by sequence
    (Liu et al. 2025, "When speed kills stability").

    Args:
        cap: largest weight that is kept; larger keeps more completions.
    """
    weights = _sequence_weights(trainer_logps, engine_logps, mask)
    return torch.where(weights <= cap, weights, 0.0)


@CORRECTIONS.own
def icepop(
    trainer_logps: Tensor,
    engine_logps: Tensor,
    mask: Tensor,
    *,
    low: Annotated[float, Field(ge=0)] = 0.5,
    high: Bound = 5.0,
) -> Tensor:
    """Return w_t where low ≤ w_t ≤ high, else 0: IcePop (Ling team 2025, "Small leak can sink a great ship"; Ring-1T, arXiv
    2510.18855, section 2.3.2).

    Args:
        low, high: the band of weights that are kept; wider keeps more tokens.
    """
    weights = _weights(trainer_logps, engine_logps, mask)
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


def _weights(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor) -> Tensor:
    """Return (R, T) w_t, 1 outside the mask."""
    return torch.where(mask, trainer_logps - engine_logps, 0.0).detach().exp()


def _sequence_weights(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor) -> Tensor:
    """Return (R, T) Π_t w_t of each completion, for each of its tokens."""
    total = torch.where(mask, trainer_logps - engine_logps, 0.0).detach().sum(dim=1, keepdim=True)
    return total.exp().expand_as(trainer_logps)
