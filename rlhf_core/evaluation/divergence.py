"""The KL of a policy to a reference along completions: exact over the vocabulary at each token, or from the drawn tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import NumbersError
from rlhf_core.models.batch_values import batch_values
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.logprobs import exact_log_softmax, over_vocabulary
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.policy_gradient.kl_estimators import k1, k3

KLEstimator = Literal["exact", "k1", "k3"]
_INFINITE = 1e30
"""Nats from which on a KL stands for an infinite one: a masked token's log-probability is the least float."""


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Return KL(π ‖ π_ref) = Σ_v π(v) (log π(v) − log π_ref(v)) of softmax distributions, (S,) nats.

    Args:
        logits: (S, V). reference_logits: (S, W). Models of one tokenizer may have tables padded to different widths; an entry
            that only one of them has belongs to no token, and is left out.
    """
    width = min(logits.shape[-1], reference_logits.shape[-1])
    # A token that a model masks has a log-probability of −inf, and 0 · inf would be no number.
    least = torch.finfo(logits.dtype).min
    own, other = (exact_log_softmax(table[..., :width]).clamp(min=least) for table in (logits, reference_logits))
    return (own.exp() * (own - other)).sum(dim=-1).clamp(min=0)


def kl_by_token(
    policy: PolicyModel,
    reference: PolicyModel,
    batch: Batch,
    *,
    estimator: KLEstimator = "exact",
    max_tokens: int = 16_384,
) -> Tensor:
    """Return an estimate of KL(π ‖ π_ref) at each response token in the loss mask, (R, T) float32 nats, 0 elsewhere.

    `exact` is the KL of the next-token distributions given the prompt and the response so far. The sum over a response drawn
    from π is an unbiased estimate of the KL of whole responses of less variance than any that reads the drawn tokens alone
    (Amini et al. 2025, arXiv 2504.10637, who name it after Rao and Blackwell). `k1` and `k3` (Schulman 2020) do: they take the
    log-probabilities of the drawn token, and are unbiased only where π drew it.

    Args:
        policy, reference: of one vocabulary.
        batch: P prompts with R responses, on any device.
        max_tokens: most tokens in one forward pass; larger takes more memory.

    Raises:
        NumbersError: the reference gives a token that the policy may draw no probability, so the KL is infinite.
    """

    def exact(micro: Batch) -> Tensor:
        if not micro.num_loss_tokens:
            return micro.loss_mask.float()
        states, others = policy.hidden_states(micro, drop_last=True), reference.hidden_states(micro, drop_last=True)
        found = over_vocabulary(exact_kl, (policy.logits, states.predicting()), (reference.logits, others.predicting()))
        return states.to_tokens(found)

    def drawn(micro: Batch) -> Tensor:
        estimate = k1 if estimator == "k1" else k3
        return estimate(policy.token_logps(micro), reference.token_logps(micro)) * micro.loss_mask

    with evaluating(policy), evaluating(reference):
        values = batch_values(
            batch,
            exact if estimator == "exact" else drawn,
            axis="token",
            cut=lambda whole: whole.split(max_tokens=max_tokens, divide=True),
            device=policy.device,
        )
    if not bool((values.abs() < _INFINITE).all()):
        raise NumbersError(
            "the KL is infinite: the reference gives a token that the policy may draw no probability",
            place="evaluation, kl",
            fix="use the model that the policy was trained from as reference",
        )
    return values
