"""What methods on preference pairs share: the logistic loss, lengths and likelihoods of responses, metrics.

Axes: P pairs, R = 2P responses, T response tokens. y_w is the chosen response of a pair, y_l the rejected one; a batch holds
each chosen response directly before its rejected one, and `Batch.pairs` splits a column (R,) into the two, (P,) each.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.contracts.batch import Batch


def logistic_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return −(1 − ε) log σ(m) − ε log σ(−m) for each margin m: the Bradley-Terry likelihood with a share ε of labels wrong.

    Mitchell 2023, "A note on DPO with noisy preferences". A margin of 0 gives log 2 for any ε.

    Args:
        margins: m, of any shape, nats.
        label_smoothing: ε, in [0, 0.5).

    Returns:
        The shape of `margins`, nats.
    """
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def pair_accuracy(margins: Tensor) -> Tensor:
    """Return 1 where a margin is above 0, 0 where it is below, 0.5 at a tie.

    With ties at one half, a policy that still equals its reference scores 0.5.

    Args:
        margins: chosen minus rejected, of any shape.
    """
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def response_tokens(batch: Batch) -> Tensor:
    """Return (R,) the number of each response's tokens in the loss, at least 1, so that it can be divided by."""
    return batch.loss_mask.sum(dim=1).clamp(min=1)


def chosen_nll(batch: Batch, logps: Tensor) -> Tensor:
    """Return (P,) −log π(y_w|x) / |y_w|, the chosen response's negative log-likelihood per token, nats.

    Args:
        logps: (R,) log-probabilities of the responses, summed over their tokens in the loss, nats.
    """
    return -batch.pairs(logps / response_tokens(batch))[0]


def pair_metrics(batch: Batch, logps: Tensor, rewards: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Return the usual metrics of preference pairs, each as (sum, pairs) or, for a standard error, as (one per pair, pairs).

    `rewards/chosen`, `rewards/rejected` and `rewards/margin`: the method's implicit rewards; `accuracy`: how often the chosen
    response has the larger one; `logps/chosen` and `logps/rejected`: log-probabilities of responses, nats.

    Args:
        logps: (R,) log-probabilities of the responses, summed over their tokens in the loss, nats; without gradients.
        rewards: (R,) the implicit reward of each response, without gradients.
    """
    pairs = batch.num_prompts
    chosen, rejected = batch.pairs(rewards)
    chosen_logps, rejected_logps = batch.pairs(logps)
    margins = chosen - rejected
    return {
        "rewards/chosen": (chosen.sum(), pairs),
        "rewards/rejected": (rejected.sum(), pairs),
        "rewards/margin": (margins, pairs),
        "accuracy": (pair_accuracy(margins), pairs),
        "logps/chosen": (chosen_logps.sum(), pairs),
        "logps/rejected": (rejected_logps.sum(), pairs),
    }
