"""The parts, put together, against TRL's GRPO losses and their gradients, where TRL is installed."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core.policy_gradient import (
    CLIPS,
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    RATIOS,
    PolicyTerms,
)

trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL isn't installed")

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
LIMIT = 6


def values() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log π with gradient, log π_old, log π_ref, (3, 4), and advantages (3,)."""
    generator = torch.Generator().manual_seed(3)
    old = -3 * torch.rand(3, 4, generator=generator)
    logps = (old + 0.4 * torch.randn(3, 4, generator=generator)).clamp(max=-1e-3)
    ref = (old + 0.2 * torch.randn(3, 4, generator=generator)).clamp(max=-1e-3)
    return logps.requires_grad_(), old, ref, torch.tensor([1.2, -0.7, -1.5])


def trls(logps: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, **options: Any) -> Tensor:
    """Return the loss of TRL's trainer for these log-probabilities."""
    args = SimpleNamespace(
        delta=options.pop("delta", None), sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        use_bias_correction_kl=options.pop("importance", False), steps_per_generation=1,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value, sync_gradients=False
    )
    trainer = SimpleNamespace(
        **{
            "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
            "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
            "vllm_importance_sampling_correction": False, "max_completion_length": LIMIT, "_entropy_bonus_enabled": False,
            "current_gradient_accumulation_steps": 1, "use_adaptive_entropy": False, **options,
        },
        args=args, accelerator=accelerator, model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )  # fmt: skip
    ones = torch.ones(3, 2, dtype=torch.long)
    inputs = {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": MASK.long(), "completion_mask": MASK.long(),
        "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": MASK.sum().float(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, SimpleNamespace(training=True), inputs)


def ours(
    logps: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, clip: str, aggregation: str, **options: Any
) -> Tensor:
    """Return the loss of parts of these names, as `grpo` puts them together."""
    log_ratio = torch.where(MASK, logps - old, 0.0)
    ratio = RATIOS.get(options.pop("ratio", "token"))(log_ratio, MASK)
    beta, importance = options.pop("beta", 0.0), options.pop("importance", False)
    terms = PolicyTerms(logps, old, ratio, advantages[:, None].expand(3, 4), MASK)
    weights, amounts = LOSS_AGGREGATIONS.get(aggregation)(MASK, limit=LIMIT)
    loss = -CLIPS.bind(clip, options)(terms)
    if beta:
        loss = loss + beta * KL_ESTIMATORS.get("k3")(logps, ref, log_ratio if importance else None)
    return (weights * loss).sum() / amounts.sum()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"beta": 0.04}, {"clip": "ppo", "aggregation": "sequence_mean", "beta": 0.04}),
    "grpo, weighted KL": (
        {"beta": 0.3, "importance": True},
        {"clip": "ppo", "aggregation": "sequence_mean", "beta": 0.3, "importance": True},
    ),
    "two-sided": ({"delta": 1.3}, {"clip": "two_sided", "aggregation": "sequence_mean", "ceiling": 1.3}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"clip": "ppo", "aggregation": "constant"}),
    "dapo": (
        {"loss_type": "dapo", "epsilon_high": 0.28},
        {"clip": "ppo", "aggregation": "token", "low": 0.2, "high": 0.28},
    ),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        {"clip": "ppo", "aggregation": "sequence_mean", "ratio": "geometric", "low": 3e-4, "high": 4e-4},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.1}, {"clip": "cispo", "aggregation": "token", "high": 0.1}),
    "sapo": ({"loss_type": "sapo"}, {"clip": "sapo", "aggregation": "sequence_mean"}),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_trls(name: str) -> None:
    given = values()
    theirs, mine = CASES[name]
    expected, found = trls(*given, **theirs), ours(*given, **mine)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected, given[0], retain_graph=True)
    (gradient,) = torch.autograd.grad(found, given[0])
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
