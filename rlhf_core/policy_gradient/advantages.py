"""Advantages: what a completion's reward is worth against the others.

Every function takes rewards (N,) of the whole step's completions and their prompts, `groups` (N,): completions of one prompt
have equal entries, and groups may be of any sizes. It returns advantages (N,). r is a reward, G the size of its group.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.infra.errors import ConfigError
from rlhf_core.policy_gradient.part_table import PartTable

ADVANTAGES = PartTable(
    "advantage",
    "What a completion's reward is worth against the others: `group_mean_std`, `leave_one_out`, `pass_at_k` …",
)
"""Functions from rewards (N,) and groups (N,) to advantages (N,)."""

NonNegative = Annotated[float, Field(ge=0)]


@ADVANTAGES.own
def none(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return A = r, the reward without a baseline: REINFORCE (Williams 1992, "Simple statistical gradient-following
    algorithms", section 4)."""
    return rewards


@ADVANTAGES.own
def group_mean(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return A = r − mean(r) over the group: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.1)."""
    index, sizes = _grouped(groups)
    return (rewards.double() - _means(rewards, index, sizes)).to(rewards.dtype)


@ADVANTAGES.own
def group_mean_std(rewards: Tensor, groups: Tensor, *, epsilon: NonNegative = 1e-6) -> Tensor:
    """Return A = (r − mean(r)) / (std(r) + ε) over the group: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    The paper doesn't say which deviation; it is the sample's, over G − 1. Equal rewards give 0.

    Raises:
        ConfigError: a group has one completion.
    """
    index, sizes = _grouped(groups, "group_mean_std", 2)
    centred = rewards.double() - _means(rewards, index, sizes)
    variance = _sums(centred.square(), index, sizes) / (sizes - 1)
    scaled = centred / (variance.sqrt() + epsilon)[index]
    return torch.where((variance > 0)[index], scaled, 0.0).to(rewards.dtype)  # 0/0 where ε is 0


@ADVANTAGES.own
def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return A = r − mean of the other rewards of the group: RLOO (Ahmadian et al. 2024, arXiv 2402.14740, section 3).

    Raises:
        ConfigError: a group has one completion.
    """
    index, sizes = _grouped(groups, "leave_one_out", 2)
    factor = (sizes / (sizes - 1))[index]
    return ((rewards.double() - _means(rewards, index, sizes)) * factor).to(rewards.dtype)


@ADVANTAGES.own
def batch_norm(rewards: Tensor, groups: Tensor, *, epsilon: NonNegative = 1e-4) -> Tensor:
    """Return A = (r − mean(r)) / max(std(r), ε) over the whole step: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262, equation 10).

    The deviation is over N. Equal rewards give 0. The floor ε, which the authors' framework has, too, keeps small what a KL in
    the reward is by rounding alone.
    """
    centred = rewards.double() - rewards.double().mean()
    return (centred / centred.square().mean().sqrt().clamp(min=max(epsilon, 1e-30))).to(rewards.dtype)


@ADVANTAGES.own
def group_mean_batch_norm(rewards: Tensor, groups: Tensor, *, epsilon: NonNegative = 1e-4) -> Tensor:
    """Return r − mean(r) over the group, then normalised over the step: REINFORCE++ with baseline (arXiv 2501.03262, section
    3.2)."""
    return batch_norm(group_mean(rewards.double(), groups), groups, epsilon=epsilon).to(rewards.dtype)


@ADVANTAGES.own
def group_mean_over_mean(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return A = (r − mean(r)) / mean(r) over the group, 0 where the mean is 0: MaxRL (Tajwar et al. 2026, arXiv 2602.02710,
    algorithm 1).

    With rewards 0 and 1 it is G/K − 1 for each of the K right answers and −1 for a wrong one: hard prompts count more, as in
    the likelihood of a right answer.

    Raises:
        ConfigError: a reward is negative.
    """
    if bool((rewards < 0).any()):
        fix = "use another advantage, or rewards from 0"
        raise ConfigError(
            "`group_mean_over_mean` needs rewards of at least 0", place="advantage", got=f"{rewards.min():g}", fix=fix
        )
    index, sizes = _grouped(groups)
    means = _means(rewards, index, sizes)
    return torch.where(means > 0, rewards.double() / means.clamp(min=1e-30) - 1, 0.0).to(rewards.dtype)


@ADVANTAGES.own
def pass_at_k(rewards: Tensor, groups: Tensor, *, k: Annotated[int, Field(ge=1)] = 4, threshold: float = 0.5) -> Tensor:
    """Return each completion's share in the chance that k of a group hold a right answer: pass@k training (Chen et al. 2025,
    arXiv 2508.10751), in the closed form of its authors' code.

    With n wrong ones of G, R̄ = 1 − C(n, k)/C(G, k) and σ = √(R̄(1 − R̄)): A = (1 − R̄)/σ for a right answer, and
    (1 − R̄ − C(n − 1, k − 1)/C(G − 1, k − 1))/σ for a wrong one; 0 where σ is 0. It is the mean over all sets of k that hold
    the completion of the set's normalised score.

    Args:
        k: completions per set; larger rewards a group for its best answers more.
        threshold: rewards above it count as right answers.

    Raises:
        ConfigError: a group has fewer than k completions.
    """
    index, sizes = _grouped(groups, f"pass_at_k with k = {k}", k)
    wrong = (rewards <= threshold).double()
    counts = _sums(wrong, index, sizes)
    of_group = [
        _pass_at_k(int(size), int(count), k) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)
    ]
    table = torch.tensor(of_group, dtype=torch.float64, device=rewards.device).view(-1, 2)  # right, wrong
    return table[index].gather(1, wrong.long()[:, None])[:, 0].to(rewards.dtype)


def _pass_at_k(size: int, wrong: int, k: int) -> tuple[float, float]:
    """Return the advantages of the right and of the wrong completions of a group."""
    mean = 1 - math.comb(wrong, k) / math.comb(size, k)
    deviation = math.sqrt(mean * (1 - mean))
    if not deviation:
        return 0.0, 0.0
    missed = math.comb(wrong - 1, k - 1) / math.comb(size - 1, k - 1)
    return (1 - mean) / deviation, (1 - mean - missed) / deviation


def _grouped(groups: Tensor, name: str = "", least: int = 1) -> tuple[Tensor, Tensor]:
    """Return (N,) the number of each completion's group, and the groups' sizes, float64.

    Raises:
        ConfigError: a group has fewer than `least` completions.
    """
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    if least > 1 and len(sizes) and (smallest := int(sizes.min())) < least:
        fix = f"raise `group_size` to at least {least}, or use another advantage"
        raise ConfigError(
            f"{name} needs groups of at least {least}", place="advantage", got=f"a group of {smallest}", fix=fix
        )
    return index, sizes.double()


def _sums(values: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros_like(sizes).index_add_(0, index, values.double())


def _means(rewards: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """Return (N,) the mean of each completion's group, float64: the sum of rewards of 32 bits is then exact enough that equal
    rewards have an advantage of 0."""
    return (_sums(rewards, index, sizes) / sizes)[index]
