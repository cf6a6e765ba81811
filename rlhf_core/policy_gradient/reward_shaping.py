"""Shapings: changes of rewards before advantages are computed from them.

Every function takes `RewardTerms` of N completions, whole groups, and returns such terms; the reward of a completion is the
weighted sum of its scores. r is a score, |o| the length of a completion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.policy_gradient.advantages import group_mean_std
from rlhf_core.policy_gradient.part_table import PartTable

SHAPINGS = PartTable(
    "shaping",
    "A change of rewards before the advantage: `overlong`, `group_normalised` …",
)
"""Functions from `RewardTerms` to `RewardTerms`."""


@dataclass(frozen=True)
class RewardTerms:
    """The scores of N completions by K rewards, and what a shaping may need."""

    scores: Tensor
    """(K, N) float32, one row per reward, unweighted."""
    weights: Tensor
    """(K,) float32."""
    groups: Tensor
    """(N,) long: completions of one prompt have equal entries."""
    lengths: Tensor
    """(N,) long: tokens of each completion."""
    limit: int
    """The largest number of tokens that a completion may have, `max_new_tokens`."""

    @property
    def total(self) -> Tensor:
        """(N,) the weighted sum of the scores."""
        return (self.weights[:, None] * self.scores).sum(dim=0)


@SHAPINGS.own
def overlong(
    terms: RewardTerms,
    *,
    buffer: Annotated[float, Field(gt=0, le=1)] = 0.2,
    penalty: Annotated[float, Field(gt=0)] = 1.0,
) -> RewardTerms:
    """Return the scores with one more, 0 up to a length of L − B, −penalty from L on and linear between: DAPO's soft overlong
    punishment (Yu et al. 2025, arXiv 2503.14476, equation 13). L is the limit, B = buffer · L.

    Args:
        buffer: share of the limit in which the punishment grows; larger punishes shorter completions, too.
        penalty: what a completion of the limit loses; larger punishes more.
    """
    width = buffer * terms.limit
    over = ((terms.lengths - (terms.limit - width)) / width).clamp(0, 1)
    scores = torch.cat([terms.scores, -penalty * over[None].to(terms.scores)])
    return replace(terms, scores=scores, weights=torch.cat([terms.weights, terms.weights.new_ones(1)]))


@SHAPINGS.own
def group_normalised(terms: RewardTerms, *, epsilon: Annotated[float, Field(ge=0)] = 1e-6) -> RewardTerms:
    """Return each reward's scores as (r − mean(r)) / (std(r) + ε) over the group, before they are summed: GDPO (Liu et al.
    2026, arXiv 2601.05242). The paper's advantage is then `batch_norm` of the weighted sum.

    Rewards of different scales then count by their weights alone, and groups that differ in one reward only still have an
    advantage.

    Raises:
        ConfigError: a group has one completion.
    """
    rows = [group_mean_std(row, terms.groups, epsilon=epsilon) for row in terms.scores]
    return replace(terms, scores=torch.stack(rows) if rows else terms.scores)
