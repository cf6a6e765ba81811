"""Log-probabilities of tokens that are known, by the functions that training computes them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.generation.sampling import TopTokens, top_tokens
from rlhf_core.generation.watching import report_forwarded
from rlhf_core.models.logprobs import exact_log_softmax, over_vocabulary
from rlhf_core.models.policy_model import PolicyModel


class ScoredTokens(NamedTuple):
    """Given tokens as a policy predicts them. Axes: T tokens, K of the most likely ones."""

    logprobs: Tensor
    """(T,) float32, nats."""
    top: TopTokens
    """(T, K) the most likely tokens in each one's place; K is 0 where none were asked for."""


def scores_of_hidden(
    policy: PolicyModel, hidden: Tensor, targets: Sequence[int], *, temperature: float, top: int = 0
) -> ScoredTokens:
    """Return log softmax(logits / temperature) of targets, and of the `top` most likely tokens in their places.

    Args:
        hidden: (T, D), the states that predict the targets.
    """
    wanted = torch.tensor(targets, device=hidden.device)
    if not top:
        logprobs = policy.target_logps(hidden, wanted, temperature=temperature)
        return ScoredTokens(logprobs, TopTokens(wanted[:, None][:, :0], logprobs[:, None][:, :0]))

    def scored(logits: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        logps = exact_log_softmax(logits / temperature)
        return logps.gather(1, own[:, None])[:, 0], *top_tokens(logps, top)

    logprobs, ids, likeliest = over_vocabulary(scored, (policy.logits, hidden), columns=[wanted])
    return ScoredTokens(logprobs.float(), TopTokens(ids, likeliest.float()))


def scores_by_forward(
    policy: PolicyModel, ids: Sequence[int], count: int, *, temperature: float, top: int = 0
) -> ScoredTokens:
    """Return what `scores_of_hidden` does for the last `count` tokens of a sequence, by a forward pass over all of it."""
    report_forwarded(len(ids), policy.network)
    before, given = (torch.tensor([part]) for part in (ids[:-count], ids[-count:]))
    lengths = [torch.tensor([part.shape[1]]) for part in (before, given)]
    batch = Batch(
        before, lengths[0], given, lengths[1], torch.tensor([0]), torch.ones_like(given, dtype=torch.bool), rows=(0,)
    )
    states = policy.hidden_states(batch.to(policy.device), drop_last=True)
    return scores_of_hidden(policy, states.predicting(), ids[-count:], temperature=temperature, top=top)
