"""Each named row of `grpo` equals its paper's loss, written out over whole sequences with plain transformers."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from online_helpers import digits, prompts
from rlhf_plugins import GRPOConfig, GRPOTrainer
from rlhf_plugins.trainers.grpo_variants import VARIANTS, VariantName
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Workbench

LIMIT = 8


@dataclass
class Completion:
    """One completion of a group with its reward: log-probabilities per token of the policy now, of the one that sampled, and of
    the reference; float64 but for the gradient's path."""

    now: Tensor
    old: Tensor
    ref: Tensor
    reward: float

    @property
    def ratio(self) -> Tensor:
        return (self.now - self.old).exp()

    @property
    def length(self) -> int:
        return len(self.now)


Groups = list[list[Completion]]


def clipped(ratio: Tensor, advantage: Tensor | float, low: float = 0.2, high: float = 0.2) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def normalised(group: list[Completion]) -> list[float]:
    rewards = [one.reward for one in group]
    deviation = statistics.stdev(rewards)
    return [(r - statistics.fmean(rewards)) / (deviation + 1e-6) for r in rewards]


def centred(group: list[Completion]) -> list[float]:
    rewards = [one.reward for one in group]
    return [r - statistics.fmean(rewards) for r in rewards]


def mean_of_groups(groups: Groups, one: Callable[[Completion, float], Tensor], of: Any = normalised) -> Tensor:
    """Return −1/P Σ_groups 1/G Σ_i J_i: what the papers write as an expectation over prompts of a group's mean."""
    total = torch.zeros(())
    for group in groups:
        total = total + sum(one(o, a) for o, a in zip(group, of(group), strict=True)) / len(group)
    return -total / len(groups)


def all_tokens(groups: Groups, one: Callable[[Completion, float], Tensor]) -> Tensor:
    """Return −Σ J_it / Σ|o_i| over the step."""
    parts = [(one(o, a), o.length) for group in groups for o, a in zip(group, normalised(group), strict=True)]
    return -sum(part.sum() for part, _ in parts) / sum(length for _, length in parts)


def grpo(groups: Groups) -> Tensor:
    """arXiv 2402.03300, equations 3 and 4, β = 0.04."""

    def one(o: Completion, a: float) -> Tensor:
        kl = (o.ref - o.now).exp() - (o.ref - o.now) - 1
        return (clipped(o.ratio, a) - 0.04 * kl).sum() / o.length

    return mean_of_groups(groups, one)


def dr_grpo(groups: Groups) -> Tensor:
    """arXiv 2503.20783: no deviation, and a constant instead of the length."""
    return mean_of_groups(groups, lambda o, a: clipped(o.ratio, a).sum() / LIMIT, centred)


def dapo(groups: Groups) -> Tensor:
    """arXiv 2503.14476, equation 8, over groups whose rewards differ; equation 13 in the rewards, L_cache = 0.2 L_max."""
    cache = 0.2 * LIMIT
    kept = [group for group in groups if len({o.reward for o in group}) > 1]
    for group in kept:
        for o in group:
            o.reward += min(0.0, (LIMIT - cache - o.length) / cache)
    return all_tokens(kept, lambda o, a: clipped(o.ratio, a, 0.2, 0.28))


def gspo(groups: Groups) -> Tensor:
    """arXiv 2507.18071, equations 5 and 7."""

    def one(o: Completion, a: float) -> Tensor:
        s = ((o.now - o.old).sum() / o.length).exp()
        return clipped(s, a, 3e-4, 4e-4)

    return mean_of_groups(groups, one)


def cispo(groups: Groups) -> Tensor:
    """arXiv 2506.13585, equations 4 and 5, no lower bound and 1 + ε_high = 5."""
    return all_tokens(groups, lambda o, a: o.ratio.detach().clamp(max=5) * a * o.now)


def rloo(groups: Groups) -> Tensor:
    """arXiv 2402.14740: R = r − β log π/π_ref of the whole completion, β = 0.03, against the mean of the others; PPO's ratio."""

    def advantages(group: list[Completion]) -> list[float]:
        returns = [o.reward - 0.03 * float((o.old - o.ref).sum()) for o in group]
        return [r - (sum(returns) - r) / (len(returns) - 1) for r in returns]

    return mean_of_groups(groups, lambda o, a: clipped((o.now - o.old).sum().exp(), a), advantages)


def reinforce_plus_plus(groups: Groups) -> Tensor:
    """arXiv 2501.03262, equations 8 to 10: each token's return has the KL to the end, all are normalised; β = 0.01, and the
    mean is over all tokens."""
    everyone = [o for group in groups for o in group]
    returns = [o.reward - 0.01 * (o.old - o.ref).flip(0).cumsum(0).flip(0) for o in everyone]
    flat = torch.cat(returns).double()
    mean, deviation = flat.mean(), flat.std(correction=0)
    terms = [clipped(o.ratio, ((r - mean) / deviation).float()).sum() for o, r in zip(everyone, returns, strict=True)]
    return -sum(terms) / len(flat)


def sapo(groups: Groups) -> Tensor:
    """arXiv 2511.20347, τ = 1 and 1.05."""

    def one(o: Completion, a: float) -> Tensor:
        tau = 1.0 if a > 0 else 1.05
        return (4 / tau / (1 + (-tau * (o.ratio - 1)).exp()) * a).sum() / o.length

    return mean_of_groups(groups, one)


def gmpo(groups: Groups) -> Tensor:
    """arXiv 2507.20673: the geometric mean of clipped ratios, ε = 0.4 of logarithms."""

    def one(o: Completion, a: float) -> Tensor:
        bounded = o.ratio.clamp(math.exp(-0.4), math.exp(0.4))
        held = torch.minimum(o.ratio, bounded) if a > 0 else torch.maximum(o.ratio, bounded)
        return held.prod() ** (1 / o.length) * a

    return mean_of_groups(groups, one)


def maxrl(groups: Groups) -> Tensor:
    """arXiv 2602.02710, algorithm 1: (r − r̄)/r̄ for whole completions, clipped per token."""

    def advantages(group: list[Completion]) -> list[float]:
        mean = statistics.fmean(o.reward for o in group)
        return [(o.reward - mean) / mean if mean else 0.0 for o in group]

    return mean_of_groups(groups, lambda o, a: clipped(o.ratio, a).sum(), advantages)


def dppo(groups: Groups) -> Tensor:
    """arXiv 2602.04879: ρA, masked where |π − π_old| > 0.15 and the advantage would move it further."""

    def one(o: Completion, a: float) -> Tensor:
        moved = o.now.detach().exp() - o.old.exp()
        masked = (moved > 0.15) if a > 0 else (moved < -0.15)
        return (o.ratio * a * ~masked).sum() / LIMIT

    return mean_of_groups(groups, one, centred)


STRAIGHT = {
    "grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "cispo": cispo, "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus, "sapo": sapo, "gmpo": gmpo, "maxrl": maxrl, "dppo": dppo,
}  # fmt: skip


def bench(**options: Any) -> Workbench:
    """Return a trainer at work on four prompts, whose policy isn't its reference."""
    config = GRPOConfig.parse(
        {
            "batch_size": 4, "group_size": 4, "max_grad_norm": None, "generation": {"max_new_tokens": LIMIT},
            "dataset": {"wrap": "none"}, "micro_batch_size": 5, **options,
        }
    )  # fmt: skip
    policy = PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())
    made = Workbench(GRPOTrainer(config, model=policy, data=prompts(count=8), rewards=[digits]))
    made.perturb(0.05)
    return made


def logps(network: Any, batch: Batch, response: int) -> Tensor:
    """Return log-probabilities of one response's tokens by plain transformers."""
    owner = int(batch.owner[response])
    prompt = batch.prompt_ids[owner, : batch.prompt_lengths[owner]].tolist()
    ids = batch.response_ids[response, : batch.response_lengths[response]].tolist()
    logits = network(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def test_every_row_is_written_out() -> None:
    assert set(STRAIGHT) == set(VARIANTS) == set(get_args(VariantName))


@pytest.mark.parametrize("name", STRAIGHT)
def test_a_row_is_its_papers_loss(name: str) -> None:
    made = bench(variant=name)
    reference = PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer()).network
    sampled = copy.deepcopy(made.trainer.policy.network)
    batch = made.window()
    made.perturb(0.15)
    found = made.step(batch)
    plain = copy.deepcopy(made.trainer.policy.network)
    plain.requires_grad_()
    texts = [
        made.trainer.policy.tokenizer.decode(ids[:length], skip_special_tokens=True)
        for ids, length in zip(batch.response_ids.tolist(), batch.response_lengths.tolist(), strict=True)
    ]
    groups: Groups = [[] for _ in range(batch.num_prompts)]
    for response, owner in enumerate(batch.owner.tolist()):
        with torch.no_grad():
            old, ref = logps(sampled, batch, response), logps(reference, batch, response)
        groups[owner].append(Completion(logps(plain, batch, response), old, ref, digits([texts[response]])[0]))
    loss = STRAIGHT[name](groups)
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), rel=2e-4, abs=2e-6)
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    assert largest > 1e-4
    for parameter_name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            difference = found.gradient[f"policy.model.{parameter_name}"] - parameter.grad
            assert float(difference.norm()) < 1e-3 * float(parameter.grad.norm()) + 1e-4 * largest, parameter_name


def test_the_page_says_what_each_row_picks() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/policy-gradient.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for name, row in VARIANTS.items():
        parts = (row.advantage, row.ratio, row.clip, row.aggregation)
        assert [part for part in parts if f"`{part}`" not in rows[name]] == [], name
        assert row.paper.split("arXiv ")[1].split(",")[0] in rows[name]
        assert not row.kl_weight or (f"`{row.kl}`" in rows[name] and f"{row.kl_weight:g}" in rows[name])
