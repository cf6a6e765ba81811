"""Aggregations: how the objectives of tokens become the loss of a step.

Every function takes the loss mask (R, T) and returns weights of tokens (R, T) and amounts of rows (R,): the loss of a step is
−Σ weights · objective / Σ amounts, both sums over all of the step's rows, whatever micro-batches and processes they are in.
A row without tokens in the loss counts in neither. |o| is the number of a row's tokens in the loss.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_core.policy_gradient.part_table import PartTable

LOSS_AGGREGATIONS = PartTable(
    "aggregation",
    "What the loss is averaged over: `token`, `sequence_mean`, `constant` …",
)
"""Functions from the loss mask (R, T) to weights of tokens (R, T) and amounts of rows (R,)."""


@LOSS_AGGREGATIONS.own
def token(mask: Tensor, *, limit: int) -> tuple[Tensor, Tensor]:
    """Return weights 1 and amounts |o|, the mean over all tokens of the step: DAPO (Yu et al. 2025, arXiv 2503.14476,
    equation 8).

    The paper writes it for one prompt's group; as in its authors' code, the mean is over all of a step's groups.
    """
    weights = mask.float()
    return weights, weights.sum(dim=1)


@LOSS_AGGREGATIONS.own
def sequence_mean(mask: Tensor, *, limit: int) -> tuple[Tensor, Tensor]:
    """Return weights 1/|o| and amounts 1, the mean over completions of their tokens' means: GRPO (Shao et al. 2024, arXiv
    2402.03300, equation 3)."""
    lengths = mask.sum(dim=1, keepdim=True)
    return mask / lengths.clamp(min=1), (lengths[:, 0] > 0).float()


@LOSS_AGGREGATIONS.own
def sequence_sum(mask: Tensor, *, limit: int) -> tuple[Tensor, Tensor]:
    """Return weights 1 and amounts 1, the mean over completions of their tokens' sums: REINFORCE over whole completions
    (Ahmadian et al. 2024, arXiv 2402.14740, equation 5)."""
    return mask.float(), mask.any(dim=1).float()


@LOSS_AGGREGATIONS.own
def constant(mask: Tensor, *, limit: int) -> tuple[Tensor, Tensor]:
    """Return weights 1/limit and amounts 1, the mean over completions of their tokens' sums divided by a constant: Dr. GRPO
    (Liu et al. 2025, arXiv 2503.20783, section 3.2, with the largest length as the constant).

    Args:
        limit: the largest number of tokens of a completion, `max_new_tokens`.
    """
    weights, amounts = sequence_sum(mask, limit=limit)
    return weights / limit, amounts
