"""DPO's trainer: where it starts, its metrics, terms and options, and steps that are sorted. Losses: test_dpo_losses.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import random_batch
from rlhf_plugins.trainers.dpo import DPOConfig, DPOTrainer, dpo_metrics
from trainers_helpers import assert_refused, built, move, small_policy

from rlhf_core.contracts.batch import Batch
from rlhf_core.models import Reference
from rlhf_core.testing import run_context, simulate
from rlhf_core.training.distribution import Distribution


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing has no effect with loss_type hinge; it is used only by",
        ),
        ({"loss_type": "ipo_length", "label_smoothing": 0.1}, "it is used only by sigmoid, robust, aot, aot_unpaired"),
        ({"tau": 0.1}, "tau has no effect with loss_type sigmoid; it is used only by discopop"),
        (
            {"loss_type": "discopop", "tau": 0.1, "label_smoothing": 0.1},
            "label_smoothing has no effect with loss_type discopop",
        ),
        ({"loss_type": "discopop", "tau": 0}, "`tau`: must be greater than 0"),
        ({"loss_type": "discopop", "tau": 2}, "`tau`: must be less than or equal to 1"),
        ({"loss_type": "sigmoyd"}, "`loss_type`: must be 'sigmoid', 'robust', 'hinge'"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "`label_smoothing`: must be less than 0.5"),
        ({"sft_weight": -1}, "`sft_weight`: must be greater than or equal to 0"),
        ({"beta": 0}, "`beta`: must be greater than 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    assert_refused(DPOConfig, options, message)


@pytest.mark.parametrize("mode", ["copy", "precompute"])
def test_the_first_loss_is_log_2_for_any_model_passed_in(mode: str) -> None:
    """The reference is the policy as passed in, changed weights and all: not the one its name would load."""
    policy = small_policy()
    move(policy)
    made = built(DPOTrainer, model=policy, reference=mode)
    batch = random_batch(3, 2)
    if mode == "precompute":
        made.reference.precompute([batch])
    (window,) = made.experience(iter([batch]), run_context(made))
    loss = made.loss(window)
    weight = made.weights(window)["preference"]
    assert weight == 3
    assert loss.terms["preference"].item() / weight == pytest.approx(math.log(2), rel=1e-6)
    assert loss.metrics["accuracy"][0].tolist() == [0.5] * 3  # type: ignore[union-attr]
    assert abs(float(loss.metrics["kl"][0])) < 1e-4


def test_metrics_by_hand() -> None:
    batch = random_batch(2, 2).attach(per_response={"ref_logps": torch.tensor([-3.0, -1.0, -5.0, -2.0])})
    logps = torch.tensor([-1.0, -2.0, -6.0, -2.5])
    found = dpo_metrics(batch, logps, beta=0.5)
    assert float(found["rewards/chosen"][0]) == pytest.approx(0.5 * (2.0 - 1.0))
    assert float(found["rewards/rejected"][0]) == pytest.approx(0.5 * (-1.0 - 0.5))
    assert found["rewards/margin"][0].tolist() == pytest.approx([0.5 * 3.0, 0.5 * -0.5])  # type: ignore[union-attr]
    assert found["accuracy"][0].tolist() == [1.0, 0.0] and found["accuracy"][1] == 2  # type: ignore[union-attr]
    assert float(found["kl"][0]) == pytest.approx(-(2.0 - 1.0 - 1.0 - 0.5)) and found["kl"][1] == 4


def window(made: DPOTrainer, batch: Batch, distribution: Distribution | None = None) -> Batch:
    """Return the batch as the method's window, with a reference that isn't the policy."""
    other = small_policy()
    move(other, seed=7)
    made.reference = Reference.create(other, "copy")
    with torch.no_grad():
        (made_window,) = made.experience(iter([batch]), run_context(made, distribution=distribution))
    return made_window


def test_the_sft_term_is_the_chosen_nll_per_token_averaged_over_pairs() -> None:
    policy, batch = small_policy(), random_batch(3, 2, masked=True)
    made, plain = built(DPOTrainer, model=policy, sft_weight=0.3), built(DPOTrainer, model=policy)
    seen = window(made, batch)
    loss, weights = made.loss(seen), made.weights(seen)
    assert weights == {"preference": 3, "sft": 3} and plain.weights(seen) == {"preference": 3}
    logps = policy.token_logps(seen).double()
    expected = 0.0
    for pair in range(3):
        mask = seen.loss_mask[2 * pair]
        if mask.any():
            expected -= 0.3 * logps[2 * pair][mask].mean().item() / 3
    assert loss.terms["sft"].item() / weights["sft"] == pytest.approx(expected, rel=1e-6)
    assert loss.terms["preference"].item() == pytest.approx(plain.loss(seen).terms["preference"].item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_a_sorted_step_is_the_same_however_it_is_divided(kind: str) -> None:
    """The gradient of two processes' shares, in micro-batches of one pair, is that of the sorted objective."""
    policy, batch, beta = small_policy(), random_batch(6, 2), 0.5
    whole = built(DPOTrainer, model=policy, loss_type=kind, beta=beta)
    seen = window(whole, batch)

    logps = policy.response_logps(seen)
    chosen, rejected = seen.pairs(logps)
    ref_chosen, ref_rejected = seen.pairs(seen["ref_logps"])
    if kind == "aot":
        margins = (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values
    else:
        margins = (chosen - ref_chosen).sort().values - (rejected - ref_rejected).sort().values
    expected = -torch.nn.functional.logsigmoid(beta * margins).sum()
    parameters = list(policy.parameters())
    theirs = gradient(expected, parameters)

    shares = [batch.select([4, 1]), batch.select([0, 5, 2, 3])]
    made = built(DPOTrainer, model=policy, loss_type=kind, beta=beta)
    seen_by = simulate(2, lambda process: window(made, shares[process.rank], process))
    total, ours = 0.0, torch.zeros_like(theirs)
    for share in seen_by:
        for micro in share.split(size=1):
            term = made.loss(micro).terms["preference"]
            total += term.item()
            ours += gradient(term, parameters)
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def gradient(term: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    parts = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten().double() for part in parts])
