"""Alignment via optimal transport: losses that compare what has the same rank within a whole optimiser step.

Sorting needs every pair of the step, so ranks come from log-probabilities computed without gradients before it. Each response
then carries its partner as a constant, and the gradient is the same for any cut into micro-batches or processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_plugins.trainers.pairs import Pairs, logistic_loss


def aot_loss(pairs: Pairs) -> Tensor:
    """Return paired AOT's loss, ℓ(β (u_(i) − v_(i))), ℓ logistic with label smoothing.

    Melnyk et al. 2024, arXiv 2406.05882, section 3, paired form: u = log π(y_w|x) − log π(y_l|x) are the policy's margins, v the
    reference's, each sorted over the step. The partners are the reference's log-probabilities of the pair with the same rank.
    Deviation: ranks are of the step, which the paper calls a mini-batch; sorting is hard.
    """
    chosen, rejected = _partners(pairs)
    return logistic_loss(pairs.beta * ((pairs.chosen - pairs.rejected) - (chosen - rejected)), pairs.label_smoothing)


def aot_unpaired_loss(pairs: Pairs) -> Tensor:
    """Return unpaired AOT's loss, ℓ(β (ρ_w(i) − ρ_l(i))), ℓ logistic with label smoothing.

    Melnyk et al. 2024, arXiv 2406.05882, section 3, unpaired form: log-ratios ρ of chosen and of rejected responses, each sorted
    over the step. A response's partner is the log-ratio of the same rank on the other side, a constant. So a comparison stands
    here twice, once with each side's gradient: the value is half of the two, the gradient that of both.
    """
    rejected_of_rank, chosen_of_rank = _partners(pairs)
    beta, smoothing = pairs.beta, pairs.label_smoothing
    both = logistic_loss(beta * (pairs.chosen_ratio - rejected_of_rank), smoothing)
    both = both + logistic_loss(beta * (chosen_of_rank - pairs.rejected_ratio), smoothing)
    return both - both.detach() / 2


def aot_partners(step: Tensor) -> Tensor:
    """Return for each pair the reference's log-probabilities of the pair whose reference margin has its margin's rank.

    Args:
        step: (N, 4) log-probabilities of chosen and rejected under the policy, then under the reference, nats.

    Returns:
        (N, 2) nats.
    """
    chosen, rejected, ref_chosen, ref_rejected = step.unbind(1)
    by_rank = step[:, 2:][(ref_chosen - ref_rejected).argsort(stable=True)]
    return by_rank[_ranks(chosen - rejected)]


def aot_unpaired_partners(step: Tensor) -> Tensor:
    """Return for each pair the rejected log-ratio of its chosen one's rank, and the chosen log-ratio of its rejected one's.

    Args and shapes as in `aot_partners`.
    """
    chosen, rejected = step[:, 0] - step[:, 2], step[:, 1] - step[:, 3]
    return torch.stack(
        [rejected.sort().values[_ranks(chosen)], chosen.sort().values[_ranks(rejected)]],
        dim=1,
    )


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort()


def _partners(pairs: Pairs) -> tuple[Tensor, Tensor]:
    if pairs.partners is None:
        raise ValueError("this loss needs partners: attach them in `experience`")
    return pairs.partners
