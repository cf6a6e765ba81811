"""The evaluation that online methods share: completions of held-out prompts, how many are right, and their rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.trainer import Pair
from rlhf_core.rewards import Scores


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return an unbiased estimate of the probability that at least one of k completions is right: 1 − C(n−c, k) / C(n, k).

    Chen et al. 2021 ("Evaluating large language models trained on code", arXiv 2107.03374), equation 1.

    Args:
        n: completions drawn of the prompt. c: how many of them are right. k: at most n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} can't be estimated from {n} completions, {c} of them right")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def completion_metrics(
    completions: Sequence[Sequence[Completion]], scores: Scores, *, right_from: float
) -> Mapping[str, Pair]:
    """Return the metrics of n completions for each of P prompts, each with one entry per prompt, for standard errors.

    `avg@n` is the share of right completions, `pass@k` the estimate for k = 2, 4, 8 … and n; `reward`, `reward/NAME`, `length` in
    tokens and `truncated` are means over completions.

    Args:
        completions: P groups of n.
        scores: of all of them, prompt by prompt.
        right_from: the least reward of a right completion.
    """
    prompts = len(completions)
    n = len(completions[0]) if completions else 1
    right = (scores.total.view(prompts, n) >= right_from).sum(1).tolist()
    one = torch.ones(prompts, dtype=torch.float64)

    def per_prompt(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    metrics: dict[str, Pair] = {**scores.per_prompt(prompts), f"avg@{n}": (per_prompt(right), one * n)}
    for k in [2**power for power in range(1, n.bit_length()) if 2**power < n] + [n] * (n > 1):
        metrics[f"pass@{k}"] = (per_prompt([pass_at_k(n, c, k) for c in right]), one)
    lengths = [[len(completion.ids) for completion in group] for group in completions]
    cut = [[completion.truncated for completion in group] for group in completions]
    metrics["length"] = (per_prompt([sum(group) for group in lengths]), one * n)
    metrics["truncated"] = (per_prompt([sum(group) for group in cut]), one * n)
    return metrics
