"""Log-probabilities of tokens that are known, by the functions that training computes them with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.generation.watching import report_forwarded
from rlhf_core.models.policy_model import PolicyModel


def logps_of_hidden(policy: PolicyModel, hidden: Tensor, targets: Sequence[int], temperature: float) -> Tensor:
    """Return (T,) float32 log softmax(logits / temperature)[target], nats, from the hidden states (T, D) that predict targets."""
    return policy.target_logps(hidden, torch.tensor(targets, device=hidden.device), temperature=temperature)


def logps_by_forward(policy: PolicyModel, ids: Sequence[int], count: int, temperature: float) -> Tensor:
    """Return (T,) float32, as `logps_of_hidden`, for the last `count` tokens of a sequence, by a forward pass over all of it."""
    report_forwarded(len(ids), policy.network)
    before, given = (torch.tensor([part]) for part in (ids[:-count], ids[-count:]))
    lengths = [torch.tensor([part.shape[1]]) for part in (before, given)]
    batch = Batch(
        before, lengths[0], given, lengths[1], torch.tensor([0]), torch.ones_like(given, dtype=torch.bool), rows=(0,)
    )
    return policy.token_logps(batch.to(policy.device), temperature=temperature)[0]
