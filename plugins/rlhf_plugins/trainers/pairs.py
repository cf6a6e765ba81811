"""What the methods on preference pairs share: their inputs, the logistic loss, the chosen response's likelihood, metrics.

Axes: P pairs, R = 2P responses. y_w is the chosen response of a pair, y_l the rejected one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.plugin import Batch


@dataclass(frozen=True)
class Pairs:
    """What a loss with a reference sees of P pairs. Log-probabilities are summed over the response's tokens, nats."""

    chosen: Tensor
    """(P,) log π(y_w|x)."""
    rejected: Tensor
    """(P,) log π(y_l|x)."""
    ref_chosen: Tensor
    """(P,) log π_ref(y_w|x)."""
    ref_rejected: Tensor
    """(P,) log π_ref(y_l|x)."""
    chosen_tokens: Tensor
    """(P,) |y_w|, tokens inside the loss mask, at least 1."""
    rejected_tokens: Tensor
    """(P,) |y_l|."""
    beta: float
    label_smoothing: float = 0.0
    tau: float = 0.05
    partners: tuple[Tensor, Tensor] | None = None
    """(P,) and (P,): what each chosen and each rejected response is compared with, for losses that sort a step; constants."""

    @property
    def chosen_ratio(self) -> Tensor:
        """(P,) ρ_w = log π(y_w|x) − log π_ref(y_w|x)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """(P,) ρ_l = log π(y_l|x) − log π_ref(y_l|x)."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """(P,) h = ρ_w − ρ_l, how much more than the reference the policy prefers the chosen response."""
        return self.chosen_ratio - self.rejected_ratio


def logistic_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return −(1 − ε) log σ(m) − ε log σ(−m) for each margin m: the Bradley-Terry likelihood with a share ε of labels wrong.

    Mitchell 2023, "A note on DPO with noisy preferences". Zero margin gives log 2 for any ε; units of m are nats.
    """
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def response_tokens(batch: Batch) -> Tensor:
    """Return (R,) the tokens of each response inside the loss mask, at least 1, so that means of nothing are 0."""
    return batch.loss_mask.sum(dim=1).clamp(min=1)


def chosen_nll(batch: Batch, logps: Tensor) -> Tensor:
    """Return (P,) −log π(y_w|x) / |y_w|, the chosen response's negative log-likelihood a token.

    Args:
        logps: (R,) token log-probabilities summed over each response, nats.
    """
    return -batch.pairs(logps / response_tokens(batch))[0]


def chosen_tokens(batch: Batch) -> int:
    """Return how many tokens of chosen responses lie inside the loss mask."""
    return int(batch.pairs(batch.loss_mask.sum(dim=1))[0].sum())


def pair_metrics(batch: Batch, logps: Tensor, rewards: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Return the metrics of pairs, as sums and counts: implicit rewards, their margin, how often it is right, likelihoods.

    Args:
        logps: (R,) token log-probabilities summed over each response, nats.
        rewards: (R,) the method's implicit reward of each response.
    """
    pairs = batch.num_prompts
    chosen, rejected = batch.pairs(rewards)
    margins = chosen - rejected
    return {
        "rewards/chosen": (chosen.sum(), pairs),
        "rewards/rejected": (rejected.sum(), pairs),
        "rewards/margin": (margins, pairs),
        # A tie counts half, so a policy that hasn't moved from its reference scores 0.5.
        "accuracy": ((margins > 0).float() + 0.5 * (margins == 0).float(), pairs),
        "logps/chosen": (batch.pairs(logps)[0].sum(), pairs),
        "logps/rejected": (batch.pairs(logps)[1].sum(), pairs),
    }
