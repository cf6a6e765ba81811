"""DPO's family of losses: pure functions of P preference pairs, one row of the table `LOSSES` each.

Every function takes `PreferencePairs` and returns a loss for each pair, (P,). In the equations y_w is the chosen response of a
pair and y_l the rejected one, ρ_w and ρ_l their log-ratios to the reference, h = ρ_w − ρ_l, σ the logistic function. All
log-probabilities are summed over a response's tokens in the loss, nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf_core.plugin import logistic_loss


@dataclass(frozen=True)
class PreferencePairs:
    """What a loss with a reference sees of P pairs. Log-probabilities are summed over a response's tokens in the loss, nats."""

    chosen: Tensor
    """(P,) log π(y_w|x)."""
    rejected: Tensor
    """(P,) log π(y_l|x)."""
    ref_chosen: Tensor
    """(P,) log π_ref(y_w|x)."""
    ref_rejected: Tensor
    """(P,) log π_ref(y_l|x)."""
    chosen_tokens: Tensor
    """(P,) |y_w|, tokens in the loss, at least 1."""
    rejected_tokens: Tensor
    """(P,) |y_l|, tokens in the loss, at least 1."""
    beta: float
    """β, the KL strength, of every loss."""
    label_smoothing: float = 0.0
    """ε, the share of pairs assumed to be labelled wrongly."""
    tau: float = 0.05
    """τ, DiscoPOP's temperature."""
    partners: tuple[Tensor, Tensor] | None = None
    """(P,) and (P,), nats: what each chosen and each rejected response is compared with, constants; for AOT's losses only."""

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


def sigmoid_loss(pairs: PreferencePairs) -> Tensor:
    """Return DPO's loss, −(1 − ε) log σ(βh) − ε log σ(−βh).

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing ε (conservative DPO) from Mitchell 2023, "A note
    on DPO with noisy preferences". Zero margin gives log 2.
    """
    return logistic_loss(pairs.beta * pairs.margin, pairs.label_smoothing)


def robust_loss(pairs: PreferencePairs) -> Tensor:
    """Return robust DPO's loss, [−(1 − ε) log σ(βh) + ε log σ(−βh)] / (1 − 2ε).

    Chowdhury et al. 2024, arXiv 2403.00409, section 3.1. Its expectation over labels that are flipped with probability ε
    is DPO's loss on the right labels. It falls without bound as h grows, so it may be negative.
    """
    margins, flipped = pairs.beta * pairs.margin, pairs.label_smoothing
    return (-(1 - flipped) * logsigmoid(margins) + flipped * logsigmoid(-margins)) / (1 - 2 * flipped)


def hinge_loss(pairs: PreferencePairs) -> Tensor:
    """Return the hinge loss, max(0, 1 − βh): SLiC-HF's (Zhao et al. 2023, arXiv 2305.10425, equation 2).

    Deviation: the margin h is relative to the reference and scaled by β, as in RSO (arXiv 2309.06657, equation 7).
    """
    return relu(1 - pairs.beta * pairs.margin)


def ipo_loss(pairs: PreferencePairs) -> Tensor:
    """Return IPO's loss, (h − 1/(2β))² (Azar et al. 2023, arXiv 2310.12036, equation 17, τ = β), nats²."""
    return (pairs.margin - 1 / (2 * pairs.beta)) ** 2


def ipo_length_loss(pairs: PreferencePairs) -> Tensor:
    """Return IPO's loss on log-ratios per token, (ρ_w/|y_w| − ρ_l/|y_l| − 1/(2β))².

    Azar et al. 2023, arXiv 2310.12036, equation 17, τ = β. Deviation: each log-ratio is divided by its response's number of
    tokens, so the target 1/(2β) is in nats per token, whatever the length.
    """
    margins = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    return (margins - 1 / (2 * pairs.beta)) ** 2


def apo_zero_loss(pairs: PreferencePairs) -> Tensor:
    """Return APO-zero's loss, 1 − σ(βρ_w) + σ(βρ_l): raise the chosen response, lower the rejected one.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7. At the reference it is 1.
    """
    return _sigmoid(-pairs.beta * pairs.chosen_ratio) + _sigmoid(pairs.beta * pairs.rejected_ratio)


def apo_down_loss(pairs: PreferencePairs) -> Tensor:
    """Return APO-down's loss, σ(βρ_w) + 1 − σ(βh): lower both responses, the rejected one more.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8. For data whose chosen responses are worse than the policy's own.
    """
    return _sigmoid(pairs.beta * pairs.chosen_ratio) + _sigmoid(-pairs.beta * pairs.margin)


def sppo_hard_loss(pairs: PreferencePairs) -> Tensor:
    """Return SPPO's loss, (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))².

    Wu et al. 2024, arXiv 2405.00675, equation 4.7 with η = 1/β. Deviation: the probabilities of winning are 1 and 0, where
    the paper estimates them with a preference model; and the opponent is the reference, not the iteration before.
    """
    target = 1 / (2 * pairs.beta)
    return (pairs.chosen_ratio - target) ** 2 + (pairs.rejected_ratio + target) ** 2


def nca_loss(pairs: PreferencePairs) -> Tensor:
    """Return NCA's loss for pairs, −log σ(βρ_w) − ½ log σ(−βρ_w) − ½ log σ(−βρ_l).

    Chen et al. 2024, arXiv 2402.05369, section 4.1, with the chosen response's probability 1 and α = β. It pulls each
    likelihood by itself, so the chosen one doesn't fall with the rejected one. At the reference it is 2 log 2.
    """
    chosen, rejected = pairs.beta * pairs.chosen_ratio, pairs.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def discopop_loss(pairs: PreferencePairs) -> Tensor:
    """Return DiscoPOP's log-ratio modulated loss, −(1 − m) log σ(βh) + m exp(−βh) with m = σ(βh/τ).

    Lu et al. 2024, arXiv 2406.08414, equation 5. It isn't monotonic: with τ = 0.05 it rises from just below h = 0 to just above,
    where the blend changes over. The second term is computed as exp(log m − βh): with τ ≤ 1 it can't overflow where the margin
    is far on the wrong side.
    """
    margins = pairs.beta * pairs.margin
    exponential = (logsigmoid(margins / pairs.tau) - margins).exp()
    return -_sigmoid(-margins / pairs.tau) * logsigmoid(margins) + exponential


def _sigmoid(values: Tensor) -> Tensor:
    """Return σ(x) as exp(log σ(x)): torch.sigmoid's gradient, y (1 − y), loses its digits near y = 1."""
    return logsigmoid(values).exp()


# AOT (alignment via optimal transport) compares what has the same rank within a whole optimiser step. Sorting needs every pair of
# the step, so ranks come from log-probabilities that `experience` computes without gradients. Each response then carries the
# value it is compared with, its partner, as a constant, and the gradient is the same for any division into micro-batches or
# processes.


def aot_loss(pairs: PreferencePairs) -> Tensor:
    """Return paired AOT's loss for each pair, ℓ(β (u_(i) − v_(i))), ℓ logistic with label smoothing.

    Melnyk et al. 2024, arXiv 2406.05882, section 3, paired form: u = log π(y_w|x) − log π(y_l|x) are the policy's margins, v the
    reference's, each sorted over the step. `partners` are the reference's log-probabilities of the pair with the same rank.
    Deviation: ranks are taken over the optimiser step, which the paper calls a mini-batch; sorting is hard.
    """
    ref_chosen, ref_rejected = _partners(pairs)
    margins = (pairs.chosen - pairs.rejected) - (ref_chosen - ref_rejected)
    return logistic_loss(pairs.beta * margins, pairs.label_smoothing)


def aot_unpaired_loss(pairs: PreferencePairs) -> Tensor:
    """Return unpaired AOT's loss for each pair, ℓ(β (ρ_w(i) − ρ_l(i))), ℓ logistic with label smoothing.

    Melnyk et al. 2024, arXiv 2406.05882, section 3, unpaired form: log-ratios ρ of chosen and of rejected responses, each sorted
    over the step. A response's partner is the log-ratio of the same rank on the other side, a constant. Each comparison therefore
    occurs twice, once with the gradient of either side: half of the two values is returned, with the gradients of both.
    """
    rejected_of_rank, chosen_of_rank = _partners(pairs)
    beta, smoothing = pairs.beta, pairs.label_smoothing
    both = logistic_loss(beta * (pairs.chosen_ratio - rejected_of_rank), smoothing)
    both = both + logistic_loss(beta * (chosen_of_rank - pairs.rejected_ratio), smoothing)
    return both - both.detach() / 2


def aot_partners(step: Tensor) -> Tensor:
    """Return for each pair the reference's log-probabilities of the pair whose reference margin has its policy margin's rank.

    Args:
        step: (N, 4) log-probabilities of all N pairs of an optimiser step: chosen and rejected under the policy, then chosen and
            rejected under the reference; summed over tokens, nats.

    Returns:
        (N, 2) chosen and rejected, nats.
    """
    chosen, rejected, ref_chosen, ref_rejected = step.unbind(1)
    by_rank = step[:, 2:][(ref_chosen - ref_rejected).argsort(stable=True)]
    return by_rank[_ranks(chosen - rejected)]


def aot_unpaired_partners(step: Tensor) -> Tensor:
    """Return for each pair the rejected log-ratio of its chosen one's rank, and the chosen log-ratio of its rejected one's.

    Args:
        step: (N, 4) as in `aot_partners`.

    Returns:
        (N, 2) log-ratios to the reference, nats.
    """
    chosen, rejected = step[:, 0] - step[:, 2], step[:, 1] - step[:, 3]
    return torch.stack([rejected.sort().values[_ranks(chosen)], chosen.sort().values[_ranks(rejected)]], dim=1)


def _ranks(values: Tensor) -> Tensor:
    """Return each value's rank, (N,), 0 for the smallest; equal values rank in their order."""
    return values.argsort(stable=True).argsort()


def _partners(pairs: PreferencePairs) -> tuple[Tensor, Tensor]:
    if pairs.partners is None:
        raise ValueError("this loss needs `partners`: compute them in `experience` from the whole step")
    return pairs.partners


@dataclass(frozen=True)
class PairLoss:
    """One row of the table of losses."""

    loss: Callable[[PreferencePairs], Tensor]
    """P pairs → (P,) losses."""
    options: frozenset[str] = frozenset()
    """Options that this loss reads and not every loss does; all read `beta`."""
    find_partners: Callable[[Tensor], Tensor] | None = None
    """(N, 4) log-probabilities of a whole step, as in `aot_partners` → (N, 2) `PreferencePairs.partners`; None for losses that
    don't sort."""


LossType = Literal[
    "sigmoid", "robust", "hinge", "ipo", "ipo_length", "apo_zero", "apo_down", "sppo_hard", "nca", "discopop", "aot",
    "aot_unpaired",
]  # fmt: skip

_SMOOTHED = frozenset({"label_smoothing"})

LOSSES: dict[LossType, PairLoss] = {
    "sigmoid": PairLoss(sigmoid_loss, _SMOOTHED),
    "robust": PairLoss(robust_loss, _SMOOTHED),
    "hinge": PairLoss(hinge_loss),
    "ipo": PairLoss(ipo_loss),
    "ipo_length": PairLoss(ipo_length_loss),
    "apo_zero": PairLoss(apo_zero_loss),
    "apo_down": PairLoss(apo_down_loss),
    "sppo_hard": PairLoss(sppo_hard_loss),
    "nca": PairLoss(nca_loss),
    "discopop": PairLoss(discopop_loss, frozenset({"tau"})),
    "aot": PairLoss(aot_loss, _SMOOTHED, aot_partners),
    "aot_unpaired": PairLoss(aot_unpaired_loss, _SMOOTHED, aot_unpaired_partners),
}
