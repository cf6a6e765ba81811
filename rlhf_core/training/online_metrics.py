"""The metrics that every online method reports: of a rollout as it is scored, and of an update from its log-probabilities.

Each is a pair (sum, count), which the core adds up over micro-batches and processes. R responses, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import Sample
from rlhf_core.contracts.trainer import Pair

GAP = "logprob_gap"
"""The response metric that compares the engine's log-probabilities with the trainer's."""
_SQUARED, _DEVIATION = "_squared", "_std"

FIRST = ("length", "truncated", "groups_without_variance", "entropy", "kl", "clipped", GAP)
"""The metrics that say most of an online step besides the reward, in the order in which a line shows them."""
DETAILS = frozenset(
    f"{name}{end}"
    for name, ends in {
        "ratio": ("", "_positive", "_negative"),
        "clipped": ("_positive", "_negative"),
        "length": ("_right", "_wrong"),
        "kl": ("_sampled",),
        GAP: ("_max",),
    }.items()
    for end in ends
)
"""The metrics of an online step that are in `metrics.jsonl` and trackers, and too many for a line."""


@torch.no_grad()
def online_metrics(
    *,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clipped: Tensor | None = None,
    ref_logps: Tensor | None = None,
    weight: Tensor | None = None,
) -> dict[str, Pair]:
    """Return what an update of a policy gradient reports, averaged over tokens in the loss.

    `ratio` is ρ = π / π_old, also by the sign of the advantage (`ratio_positive`, `ratio_negative`); `kl_sampled` is
    ρ − 1 − ln ρ, an estimate of KL(π_old ‖ π) for tokens that π_old drew (k3 in Schulman's "Approximating KL divergence",
    2020); `clipped`, `clipped_positive` and `clipped_negative` are shares of tokens; `kl` is w (ln π − ln π_ref), an estimate of
    KL(π ‖ π_ref).

    Args:
        logps: (R, T) ln π of the policy that is trained, nats.
        old_logps: (R, T) ln π_old of the policy that drew the completions.
        advantages: (R,), (R, 1) or (R, T).
        mask: (R, T) bool, the tokens in the loss.
        clipped: (R, T) bool, the tokens that clipping leaves without a gradient.
        ref_logps: (R, T) ln π_ref.
        weight: (R, T) w, the importance weight of each token, where completions weren't drawn from π itself; None is 1.
    """
    signs = advantages if advantages.ndim == 2 else advantages[:, None]
    everywhere = torch.ones_like(mask)
    tokens = {"": mask, "_positive": mask & (signs > 0), "_negative": mask & (signs < 0)}
    log_ratio = torch.where(mask, logps - old_logps, 0.0).float()
    ratio = log_ratio.exp()
    metrics: dict[str, Pair] = {}
    for sign, chosen in tokens.items():
        chosen = chosen & everywhere
        metrics[f"ratio{sign}"] = (torch.where(chosen, ratio, 0.0).sum(), chosen.sum())
        if clipped is not None:
            metrics[f"clipped{sign}"] = ((clipped & chosen).sum(), chosen.sum())
    metrics["kl_sampled"] = (torch.where(mask, ratio - 1 - log_ratio, 0.0).sum(), mask.sum())
    if ref_logps is not None:
        apart = logps - ref_logps if weight is None else (logps - ref_logps) * weight
        metrics["kl"] = (torch.where(mask, apart, 0.0).sum(), mask.sum())
    return metrics


@torch.no_grad()
def logprob_gaps(logps: Tensor, engine_logps: Tensor, mask: Tensor) -> dict[str, Pair]:
    """Return |ln π − ln q| of each response, for `Loss.responses`: sums over its tokens in the loss, and their number.

    The core reports it for the first update of each rollout, at which both are of the same weights: `logprob_gap` is the mean per
    token, `logprob_gap_max` the largest mean of a completion.

    Args:
        logps: (R, T) ln π by the trainer, nats.
        engine_logps: (R, T) ln q by the engine of the same tokens, at the same temperature and without truncation.
        mask: (R, T) bool, the tokens in the loss.
    """
    return {GAP: (torch.where(mask, (logps - engine_logps).abs(), 0.0).sum(1), mask.sum(1))}


def gap_metrics(parts: Sequence[Sequence[tuple[float, float]]]) -> dict[str, float]:
    """Return the mean gap per token, and the largest mean of a response, from each process's (sum, count) of its responses."""
    pairs = [pair for part in parts for pair in part if pair[1]]
    if not pairs:
        return {}
    mean = math.fsum(total for total, _ in pairs) / sum(count for _, count in pairs)
    return {GAP: mean, f"{GAP}_max": max(total / count for total, count in pairs)}


def rollout_metrics(
    samples: Sequence[Sample], completions: Sequence[Completion], rewards: Sequence[float] | None, *, right_from: float
) -> dict[str, tuple[float, float]]:
    """Return what a rollout reports, for N completions, group after group.

    `entropy` is the mean of −ln q over the tokens drawn, q the distribution that each was drawn from: an unbiased estimate of its
    entropy, nats per token. `groups_without_variance` is the share of groups, of at least two, whose rewards are all equal.

    Args:
        samples: N. completions: the same N. rewards: (N,) the weighted sums; None without rewards.
        right_from: the least reward of a right completion.
    """
    lengths = [len(one.ids) for one in completions]
    metrics = {
        "length": (float(sum(lengths)), float(len(lengths))),
        "truncated": (float(sum(one.truncated for one in completions)), float(len(lengths))),
        "entropy": (-math.fsum(logp for one in completions for logp in one.logprobs), float(sum(lengths))),
    }
    if rewards is None:
        return metrics
    groups: dict[int, list[float]] = {}
    for sample, reward in zip(samples, rewards, strict=True):
        groups.setdefault(sample.group, []).append(reward)
    several = [group for group in groups.values() if len(group) > 1]
    alike = sum(min(group) == max(group) for group in several)
    for name, right in (("length_right", True), ("length_wrong", False)):
        of = [length for length, reward in zip(lengths, rewards, strict=True) if (reward >= right_from) == right]
        metrics[name] = (float(sum(of)), float(len(of)))
    metrics["reward"] = (math.fsum(rewards), float(len(rewards)))
    metrics["reward" + _SQUARED] = (math.fsum(reward * reward for reward in rewards), float(len(rewards)))
    metrics["groups_without_variance"] = (float(alike), float(len(several)))
    return metrics


def with_deviations(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with the standard deviation `NAME_std` in place of each mean of squares `NAME_squared`."""
    found = {}
    for name, value in metrics.items():
        base = name.removesuffix(_SQUARED)
        if base != name and base in metrics:
            found[base + _DEVIATION] = math.sqrt(max(value - metrics[base] ** 2, 0.0))
        else:
            found[name] = value
    return found
