"""Log-probabilities of tokens that are known, from hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.models.backbone import accepted
from rlhf_core.models.logprobs import over_vocabulary
from rlhf_core.models.policy_model import PolicyModel


def target_logps(policy: PolicyModel, hidden: Tensor, targets: Sequence[int], temperature: float) -> Tensor:
    """Return (T,) float32 log softmax(logits / temperature)[target], nats, for hidden states (T, D)."""
    index = torch.tensor(list(targets), device=hidden.device)

    def logps(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, targets[:, None])[:, 0]

    return over_vocabulary(logps, (policy.logits, hidden), columns=(index,))


def sequence_logps(policy: PolicyModel, ids: Sequence[int], start: int, temperature: float) -> Tensor:
    """Return (T,) the log-probabilities of a sequence's tokens from place `start` on, by a forward pass over all of it."""
    whole = torch.tensor([list(ids)], device=policy.device)
    logits = policy.network(input_ids=whole, **accepted(policy.network.forward, use_cache=False)).logits
    logps = torch.log_softmax(logits[0, start - 1 : -1].float() / temperature, dim=-1)
    return logps.gather(1, whole[0, start:, None])[:, 0]
