"""How far the log-probabilities that generation reports are from those that training computes for the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.policy_model import PolicyModel


class Gap(NamedTuple):
    """Absolute differences of log-probabilities per token, nats."""

    mean: float
    max: float


@torch.no_grad()
def logprob_gap(policy: PolicyModel, batch: Batch, completions: Sequence[Sequence[Completion]]) -> Gap:
    """Return how far `Completion.raw_logprobs` are from `PolicyModel.token_logps` for the tokens in the loss.

    Args:
        policy: with the weights that drew the completions.
        batch: the prompts.
        completions: for each prompt, those that were drawn; together at least one token.
    """
    made = Batch.from_completions(batch, completions)
    with evaluating(policy):
        difference = (policy.token_logps(made) - made["raw_logps"]).abs()[made.loss_mask]
    return Gap(float(difference.mean()), float(difference.max()))
