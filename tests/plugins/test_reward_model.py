"""Reward models: the ranking loss against float64 and TRL, ensembles, calibration, and what is learned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from batches import random_batch, relative
from rlhf_plugins.trainers.reward_model import (
    RewardModelConfig,
    RewardModelTrainer,
    centring_penalty,
    disagreement,
    ranking_loss,
)
from trainers_helpers import TrlMetrics, assert_same, built, small_policy

from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import RewardModel
from rlhf_core.testing import TrainerContract, run_context
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.tiny import save_tiny


class TestRewardModel(TrainerContract):
    method = "reward_model"


@pytest.mark.slow
class TestEnsembleOfHeads(TrainerContract):
    method = "reward_model"
    options: ClassVar[dict[str, Any]] = {"ensemble": {"size": 3, "bootstrap": True}}


@pytest.mark.slow
class TestEnsembleOfModels(TrainerContract):
    method = "reward_model"
    options: ClassVar[dict[str, Any]] = {
        "ensemble": {"size": 2, "share_backbone": False},
        "margin": 0.5,
        "centre_weight": 0.01,
    }


@pytest.mark.slow
class TestRewardModelWithAdapter(TrainerContract):
    method = "reward_model"
    options: ClassVar[dict[str, Any]] = {"lora": {"rank": 4}}


def scores(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(5, 2, generator=torch.Generator().manual_seed(seed))


def test_golden_numbers() -> None:
    one = torch.tensor([[1.0]])
    assert ranking_loss(one, one).item() == pytest.approx(math.log(2), rel=1e-6)
    assert ranking_loss(3 * one, one, 1.0).item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    assert centring_penalty(3 * one, -one).item() == 4.0


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_loss_and_gradient_equal_float64(margin: float) -> None:
    chosen, rejected = scores(1).requires_grad_(), scores(2).requires_grad_()
    found = ranking_loss(chosen, rejected, margin) + 0.3 * centring_penalty(chosen, rejected)
    c, r = chosen.double(), rejected.double()
    expected = torch.log(1 + torch.exp(-(c - r - margin))) + 0.3 * (c + r).pow(2)
    assert_same(found, expected, [chosen, rejected])


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    chosen, rejected = scores(1).requires_grad_(), scores(2).requires_grad_()
    up, down = torch.autograd.grad(ranking_loss(chosen, rejected).sum(), (chosen, rejected))
    assert (up < 0).all() and (down > 0).all()


def test_far_scores_stay_finite() -> None:
    far = torch.tensor([[-1e4, 1e4]])
    assert ranking_loss(far, -far).tolist() == [[2e4, 0.0]]


def test_loss_equals_trl() -> None:
    peer = pytest.importorskip("trl.trainer.reward_trainer", reason="TRL isn't installed (extra `oracles`)")
    trainer = built(RewardModelTrainer, centre_weight=0.05)
    batch = random_batch(4, 2).attach(per_prompt={"margin": torch.tensor([0.0, 0.5, 1.0, 0.2])})
    (window,) = trainer.experience(iter([batch]), run_context(trainer))
    loss, weights = trainer.loss(window), trainer.weights(window)
    ours = torch.stack([loss.terms[name] / weights[name] for name in weights]).sum()
    # TRL wants all chosen rows before all rejected ones.
    order = [*range(0, 8, 2), *range(1, 8, 2)]
    logits = trainer.reward.score(batch)[order, None]

    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    stub: Any = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=0.05, gradient_accumulation_steps=1),
        center_rewards_coefficient=0.05, model=SimpleNamespace(training=True), _metrics={"train": TrlMetrics()},
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x, device="cpu"),
        _total_train_tokens=0, aux_loss_enabled=False, loss_type="bradley_terry", _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(8, 3, dtype=torch.long),
        "attention_mask": torch.ones(8, 3, dtype=torch.long),
        "margin": batch["margin"],
    }
    theirs = peer.RewardTrainer.compute_loss(stub, model, inputs)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    head = trainer.reward.heads[0].inner.weight  # type: ignore[union-attr]
    a, b = (torch.autograd.grad(x, head, retain_graph=True)[0] for x in (ours, theirs))
    assert relative(a, b) < 1e-5


def test_bootstrap_weights_are_a_function_of_the_row() -> None:
    trainer = built(RewardModelTrainer, ensemble={"size": 4, "bootstrap": True})
    batch = random_batch(6, 2)
    run = run_context(trainer)
    window, part = trainer.experience(iter([batch, batch.select([4, 1])]), run)
    assert torch.equal(part["member_weights"], window["member_weights"][[4, 1]])
    others = (replace(batch, rows=tuple(range(10 * i, 10 * i + 6))) for i in range(200))
    draws = torch.cat([window["member_weights"] for window in trainer.experience(others, run)])
    assert draws.mean().item() == pytest.approx(1.0, abs=0.08) and draws.var().item() == pytest.approx(1.0, abs=0.2)


def test_an_ensemble_learns_ranks_and_doubts(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", hidden=32, layers=2, heads=2)
    rows = list(ArithmeticTask(terms=2, digits=1).rows("preference", 120, seed=3))
    config = RewardModelConfig.parse(
        {"max_steps": 25, "batch_size": 32, "learning_rate": 3e-3, "max_length": 128, "ensemble": {"size": 3}}
    )
    output = tmp_path / "run"
    trainer = RewardModelTrainer(config, model=model, data=rows, eval_data=rows[:60], output=output)
    found = trainer.train().eval_metrics
    assert found["eval_accuracy"] > 0.75 and found["eval_accuracy_se"] > 0
    assert found["eval_scores/chosen"] > found["eval_scores/rejected"]
    assert 0 <= found["eval_calibration_error"] <= 0.5 and 0 < found["eval_brier"] < 0.25
    assert found["eval_scores/p05"] <= found["eval_scores/p50"] <= found["eval_scores/p95"]
    assert found["eval_uncertainty"] > 0 and 0 < found["eval_disagreement"] < 0.71
    trained = RewardModel.from_pretrained(output / "model")
    assert trained.members == 3
    # Training continues from its heads; another number of members is refused.
    again = RewardModelTrainer(config.updated(max_steps=1), model=output / "model", data=rows, eval_data=rows[:60])
    assert again.train().eval_metrics["eval_accuracy"] > 0.75
    wrong = config.updated(ensemble={"size": 2})
    with pytest.raises(ConfigError, match="is 2, but the model has"):
        RewardModelTrainer(wrong, model=output / "model", data=rows).train()


def test_whether_members_were_centred_is_noted(tmp_path: Path) -> None:
    model: Any = save_tiny(tmp_path / "tiny", hidden=32, layers=1, heads=2)
    rows = list(ArithmeticTask().rows("preference", 8))
    # Trained further without the penalty, centred members drift apart, and the model says so.
    for number, weight in enumerate((0.01, 0.0)):
        options = {"max_steps": 1, "batch_size": 4, "centre_weight": weight, "logging": {"progress": False}}
        output = tmp_path / f"run-{number}"
        RewardModelTrainer(RewardModelConfig.parse(options), model=model, data=rows, output=output).train()
        model = output / "model"
        assert json.loads((model / "reward_head.json").read_text())["centred"] is (weight > 0)
        assert RewardModel.from_pretrained(model).centred is (weight > 0)


def test_a_model_passed_in_keeps_its_members_or_is_refused() -> None:
    model = RewardModel.on(small_policy().without_head(), members=2)

    def adopt(**ensemble: Any) -> Any:
        return built(RewardModelTrainer, model=model, ensemble=ensemble).reward

    assert adopt(bootstrap=True) is model and adopt(size=2, share_backbone=True) is model
    with pytest.raises(ConfigError, match="is 3, but the model has 2 members"):
        adopt(size=3)
    with pytest.raises(ConfigError, match="the model's ensemble members have one backbone"):
        adopt(share_backbone=False)


def test_disagreement_is_about_which_is_better() -> None:
    # σ(log 3) = 3/4 and σ(-log 3) = 1/4, whose standard deviation is 1 / (2 √2).
    three = math.log(3.0)
    found = disagreement(torch.tensor([[three, -three], [2.0, 2.0], [0.0, 1.0], [5.0, 6.0]]))
    assert found[:2].tolist() == pytest.approx([0.125**0.5, 0.0], abs=1e-7)
    assert found[2] > 30 * found[3]  # one margin apart, but of the second pair both are sure


def test_held_out_rows_are_not_bootstrapped() -> None:
    trainer = built(RewardModelTrainer, ensemble={"size": 4, "bootstrap": True})
    (held_out,) = trainer.experience(iter([random_batch(6, 2)]), run_context(trainer, evaluating=True))
    assert (held_out["member_weights"] == 1).all()
