"""SimPO: golden numbers, limits, signs, float64, TRL's own code, its terms on a model, and the contract."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from batches import random_batch
from hypothesis import given
from hypothesis import strategies as st
from rlhf_plugins.trainers.simpo import SimPOConfig, SimPOTrainer, simpo_loss
from torch import Tensor
from trainers_helpers import assert_refused, assert_same, built

from rlhf_core.testing import TrainerContract


def means(seed: int = 0, pairs: int = 7) -> list[Tensor]:
    """Return average token log-probabilities whose differences are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [(-torch.randint(1 << 12, (pairs,), generator=generator) / (1 << 10)).requires_grad_() for _ in range(2)]


def check(values: list[Tensor], beta: float, gamma: float, eps: float) -> None:
    """Compare with the paper's formula, written with exp and log in float64."""
    found = simpo_loss(values[0], values[1], beta, gamma, eps)
    prefer = 1 / (1 + torch.exp(-(beta * values[0].double() - beta * values[1].double() - gamma)))
    expected = -(1 - eps) * prefer.log() - eps * (1 - prefer).log()
    assert_same(found, expected, values)


@pytest.mark.parametrize(
    ("beta", "gamma", "eps"), [(2.0, 1.0, 0.0), (2.5, 0.0, 0.0), (10.0, 3.0, 0.2), (0.1, 0.5, 0.4)]
)
def test_loss_and_gradient_equal_float64(beta: float, gamma: float, eps: float) -> None:
    check(means(), beta, gamma, eps)


# In 256ths, so that no difference loses digits before the loss sees it.
NATS = st.integers(-1280, 0).map(lambda n: n / 256)


@given(
    st.lists(st.tuples(NATS, NATS), min_size=1, max_size=8), st.sampled_from([0.5, 2.0]), st.sampled_from([0.0, 0.75])
)
def test_any_pairs_equal_float64(pairs: list[tuple[float, float]], beta: float, gamma: float) -> None:
    check([torch.tensor(column).requires_grad_() for column in zip(*pairs, strict=True)], beta, gamma, 0.0)


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_loss_equals_trl(gamma: float, eps: float) -> None:
    trl = pytest.importorskip("trl.experimental.cpo", reason="TRL isn't installed (extra `oracles`)")
    values = means(1)
    stub = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=2.0, label_smoothing=eps,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, rewards, _ = trl.CPOTrainer.cpo_loss(stub, *values)
    ours = simpo_loss(*values, 2.0, gamma, eps)
    assert torch.equal(rewards, 2.0 * values[0].detach())
    assert_same(ours, theirs, values)


def loss_of(chosen: float, rejected: float, beta: float, gamma: float, eps: float = 0.0) -> float:
    return simpo_loss(torch.tensor(chosen), torch.tensor(rejected), beta, gamma, eps).item()


def test_golden_numbers() -> None:
    # 2 · (−0.5 + 1) − 0.5 = 0.5
    assert loss_of(-0.5, -1.0, 2.0, 0.5) == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-6)
    smoothed = 0.9 * math.log1p(math.exp(-0.5)) + 0.1 * math.log1p(math.exp(0.5))
    assert loss_of(-0.5, -1.0, 2.0, 0.5, 0.1) == pytest.approx(smoothed, rel=1e-6)
    # A reward difference equal to γ gives log 2, and so do equal responses where γ is 0.
    assert loss_of(-0.5, -1.0, 2.0, 1.0) == pytest.approx(math.log(2), rel=1e-6)
    assert loss_of(-0.7, -0.7, 2.0, 0.0) == pytest.approx(math.log(2), rel=1e-6)
    assert loss_of(-0.7, -0.7, 2.0, 1.0) == pytest.approx(math.log1p(math.e), rel=1e-6)
    # Without a scale only γ is left.
    assert loss_of(-0.1, -9.0, 1e-9, 1.0) == pytest.approx(math.log1p(math.e), rel=1e-6)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    values = [torch.full((1,), -1.0, requires_grad=True) for _ in range(2)]
    chosen, rejected = torch.autograd.grad(simpo_loss(*values, 2.0, 0.0).sum(), values)
    assert (chosen.item(), rejected.item()) == (-1.0, 1.0)  # β σ(0)


def test_terms_and_metrics_on_a_model() -> None:
    made, batch = built(SimPOTrainer, gamma=0.3, sft_weight=0.5), random_batch(4, 2, masked=True)
    logps = made.policy.token_logps(batch).detach().double()
    rewards = [
        2.0 * float(row[mask].mean()) if mask.any() else 0.0 for row, mask in zip(logps, batch.loss_mask, strict=True)
    ]
    margins = [rewards[2 * pair] - rewards[2 * pair + 1] for pair in range(4)]
    loss, weights = made.loss(batch), made.weights(batch)
    tokens = int(batch.loss_mask[0::2].sum())
    assert weights == {"preference": 4, "sft": tokens}
    expected = sum(math.log1p(math.exp(0.3 - margin)) for margin in margins)
    assert loss.terms["preference"].item() == pytest.approx(expected, rel=1e-6)
    assert loss.terms["sft"].item() == pytest.approx(-0.5 * float(logps[0::2].sum()), rel=1e-6)
    found, count = loss.metrics["rewards/margin"]
    assert found.tolist() == pytest.approx(margins, rel=1e-4) and count == 4  # type: ignore[union-attr]
    assert loss.metrics["accuracy"][0].tolist() == [float(margin > 0) for margin in margins]  # type: ignore[union-attr]
    assert float(loss.metrics["rewards/chosen"][0]) == pytest.approx(sum(rewards[0::2]), rel=1e-5)
    assert float(loss.metrics["logps/rejected"][0]) == pytest.approx(float(logps[1::2].sum()), rel=1e-5)
    assert set(built(SimPOTrainer).weights(batch)) == set(built(SimPOTrainer).loss(batch).terms) == {"preference"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, "`gamma`: must be greater than or equal to 0"),
        ({"beta": 0}, "`beta`: must be greater than 0"),
        ({"label_smoothing": 0.5}, "`label_smoothing`: must be less than 0.5"),
        ({"reference": "copy"}, "unknown option `reference`"),
        ({"gama": 1}, "unknown option `gama`; fix: did you mean `gamma`?"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    assert_refused(SimPOConfig, options, message)


class TestSimPO(TrainerContract):
    method = "simpo"


@pytest.mark.slow
class TestSimPOWithImitation(TrainerContract):
    method = "simpo"
    options: ClassVar = {"sft_weight": 0.5, "gamma": 0.5, "label_smoothing": 0.1}
