"""DPO's family of losses: pure functions of P pairs, one row of the table each.

Every function takes `Pairs` and returns (P,) losses. In the equations ρ_w and ρ_l are the log-ratios of the chosen and the
rejected response to the reference, h = ρ_w − ρ_l, σ the logistic function; all summed over response tokens, nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf_plugins.trainers.dpo_aot import aot_loss, aot_partners, aot_unpaired_loss, aot_unpaired_partners
from rlhf_plugins.trainers.pairs import Pairs, logistic_loss


def sigmoid_loss(pairs: Pairs) -> Tensor:
    """Return DPO's loss, −(1 − ε) log σ(βh) − ε log σ(−βh).

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing ε (conservative DPO) from Mitchell 2023, "A note
    on DPO with noisy preferences". Zero margin gives log 2.
    """
    return logistic_loss(pairs.beta * pairs.margin, pairs.label_smoothing)


def robust_loss(pairs: Pairs) -> Tensor:
    """Return robust DPO's loss, [−(1 − ε) log σ(βh) + ε log σ(−βh)] / (1 − 2ε).

    Chowdhury et al. 2024, arXiv 2403.00409, section 3.1. Its mean over labels flipped with probability ε is DPO's loss on
    the right labels. It falls without bound as h grows, so it may be negative.
    """
    margins, flipped = pairs.beta * pairs.margin, pairs.label_smoothing
    return (-(1 - flipped) * logsigmoid(margins) + flipped * logsigmoid(-margins)) / (1 - 2 * flipped)


def hinge_loss(pairs: Pairs) -> Tensor:
    """Return the hinge loss, max(0, 1 − βh): SLiC-HF's (Zhao et al. 2023, arXiv 2305.10425, equation 2).

    Deviation: the margin is the difference to the reference scaled by β, as in RSO (arXiv 2309.06657, equation 7).
    """
    return relu(1 - pairs.beta * pairs.margin)


def ipo_loss(pairs: Pairs) -> Tensor:
    """Return the IPO loss, (h − 1/(2β))² (Azar et al. 2023, arXiv 2310.12036, equation 17, τ = β)."""
    return (pairs.margin - 1 / (2 * pairs.beta)) ** 2


def ipo_length_loss(pairs: Pairs) -> Tensor:
    """Return IPO's loss on log-ratios a token, (ρ_w/|y_w| − ρ_l/|y_l| − 1/(2β))².

    Azar et al. 2023, arXiv 2310.12036, equation 17, τ = β. Deviation: each log-ratio is divided by its response's tokens, so
    the target 1/(2β) is nats a token, whatever the length.
    """
    margins = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    return (margins - 1 / (2 * pairs.beta)) ** 2


def apo_zero_loss(pairs: Pairs) -> Tensor:
    """Return APO-zero's loss, 1 − σ(βρ_w) + σ(βρ_l): raise the chosen response, lower the rejected one.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7. At the reference it is 1.
    """
    return _sigmoid(-pairs.beta * pairs.chosen_ratio) + _sigmoid(pairs.beta * pairs.rejected_ratio)


def apo_down_loss(pairs: Pairs) -> Tensor:
    """Return APO-down's loss, σ(βρ_w) + 1 − σ(βh): lower both responses, the rejected one more.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8. For data whose chosen responses are worse than the policy's own.
    """
    return _sigmoid(pairs.beta * pairs.chosen_ratio) + _sigmoid(-pairs.beta * pairs.margin)


def sppo_hard_loss(pairs: Pairs) -> Tensor:
    """Return SPPO's loss, (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))².

    Wu et al. 2024, arXiv 2405.00675, equation 4.7 with η = 1/β. Deviation: the probabilities of winning are 1 and 0, where
    the paper estimates them with a preference model; and the opponent is the reference, not the iteration before.
    """
    target = 1 / (2 * pairs.beta)
    return (pairs.chosen_ratio - target) ** 2 + (pairs.rejected_ratio + target) ** 2


def nca_loss(pairs: Pairs) -> Tensor:
    """Return NCA's loss for pairs, −log σ(βρ_w) − ½ log σ(−βρ_w) − ½ log σ(−βρ_l).

    Chen et al. 2024, arXiv 2402.05369, section 4.1, with the chosen response's probability 1 and α = β. It pulls each
    likelihood by itself, so the chosen one doesn't fall with the rejected one. At the reference it is 2 log 2.
    """
    chosen, rejected = pairs.beta * pairs.chosen_ratio, pairs.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def discopop_loss(pairs: Pairs) -> Tensor:
    """Return DiscoPOP's log-ratio modulated loss, −(1 − m) log σ(βh) + m exp(−βh) with m = σ(βh/τ).

    Lu et al. 2024, arXiv 2406.08414, equation 5. It isn't monotonic: with τ = 0.05 it rises from just below h = 0 to just above,
    where the blend changes over. The second term is computed as exp(log m − βh): with τ ≤ 1 it can't overflow where the margin
    is far on the wrong side.
    """
    margins = pairs.beta * pairs.margin
    exponential = (logsigmoid(margins / pairs.tau) - margins).exp()
    return -_sigmoid(-margins / pairs.tau) * logsigmoid(margins) + exponential


def _sigmoid(values: Tensor) -> Tensor:
    # torch.sigmoid's gradient is y (1 − y), which loses its digits near y = 1.
    return logsigmoid(values).exp()


@dataclass(frozen=True)
class PairLoss:
    """One row of the table."""

    loss: Callable[[Pairs], Tensor]
    options: frozenset[str] = frozenset()
    """Options that mean something with this loss alone; `beta` does with all."""
    match: Callable[[Tensor], Tensor] | None = None
    """(N, 4) chosen, rejected and both references of a whole step → (N, 2) `Pairs.partners`; None for losses that don't sort."""


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
