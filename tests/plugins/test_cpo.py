"""CPO: golden numbers, limits, signs, float64, TRL's own code, its terms on a model, and the contract."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from batches import random_batch
from hypothesis import given
from hypothesis import strategies as st
from rlhf_plugins.trainers.cpo import CPOConfig, CPOTrainer, cpo_loss
from torch import Tensor
from trainers_helpers import assert_refused, assert_same, built

from rlhf_core.testing import TrainerContract


def sums(seed: int = 0, pairs: int = 7) -> list[Tensor]:
    """Return summed log-probabilities whose differences are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [(-torch.randint(1 << 14, (pairs,), generator=generator) / (1 << 8)).requires_grad_() for _ in range(2)]


def check(values: list[Tensor], beta: float, eps: float) -> None:
    """Compare with the paper's ratio of powers in float64, as -log(a / (a + b)) = log(1 + b / a), which keeps its digits."""
    found = cpo_loss(values[0], values[1], beta, eps)
    chosen, rejected = (torch.exp(beta * value.double()) for value in values)
    expected = (1 - eps) * (rejected / chosen).log1p() + eps * (chosen / rejected).log1p()
    assert_same(found, expected, values)


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_loss_and_gradient_equal_float64(beta: float, eps: float) -> None:
    check(sums(), beta, eps)


NATS = st.integers(-12800, 0).map(lambda n: n / 256)


@given(st.lists(st.tuples(NATS, NATS), min_size=1, max_size=8), st.sampled_from([0.125, 0.5]))
def test_any_pairs_equal_float64(pairs: list[tuple[float, float]], beta: float) -> None:
    check([torch.tensor(column).requires_grad_() for column in zip(*pairs, strict=True)], beta, 0.0)


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_equals_trl(beta: float, eps: float) -> None:
    trl = pytest.importorskip("trl.experimental.cpo", reason="TRL isn't installed (extra `oracles`)")
    values = sums(1)
    stub = SimpleNamespace(
        alpha=0.0, loss_type="sigmoid", beta=beta, label_smoothing=eps, accelerator=SimpleNamespace(device="cpu")
    )
    theirs, rewards, _ = trl.CPOTrainer.cpo_loss(stub, *values)
    ours = cpo_loss(*values, beta, eps)
    assert torch.equal(rewards, beta * values[0].detach())
    assert_same(ours, theirs, values)


def loss_of(chosen: float, rejected: float, beta: float, eps: float = 0.0) -> float:
    return cpo_loss(torch.tensor(chosen), torch.tensor(rejected), beta, eps).item()


def test_golden_numbers() -> None:
    # 0.1 · (−10 + 30) = 2
    good, bad = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert loss_of(-10.0, -30.0, 0.1) == pytest.approx(good, rel=1e-6)
    assert loss_of(-30.0, -10.0, 0.1) == pytest.approx(bad, rel=1e-6)
    assert loss_of(-10.0, -30.0, 0.1, 0.25) == pytest.approx(0.75 * good + 0.25 * bad, rel=1e-6)
    assert loss_of(-7.0, -7.0, 0.1) == pytest.approx(math.log(2), rel=1e-6)
    assert loss_of(-7.0, -90.0, 1e-9) == pytest.approx(math.log(2), rel=1e-6)
    assert loss_of(-1e5, 0.0, 1.0) == pytest.approx(1e5, rel=1e-6)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    values = [torch.full((1,), -9.0, requires_grad=True) for _ in range(2)]
    chosen, rejected = torch.autograd.grad(cpo_loss(*values, 0.5).sum(), values)
    assert (chosen.item(), rejected.item()) == (-0.25, 0.25)  # β σ(0)


def test_terms_and_metrics_on_a_model() -> None:
    made, batch = built(CPOTrainer, sft_weight=0.7), random_batch(4, 2, masked=True)
    logps = made.policy.token_logps(batch).detach().double()
    margins = [0.1 * float(logps[2 * pair].sum() - logps[2 * pair + 1].sum()) for pair in range(4)]
    loss, weights = made.loss(batch), made.weights(batch)
    assert weights == {"preference": 4, "sft": int(batch.loss_mask[0::2].sum())}
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins)
    assert loss.terms["preference"].item() == pytest.approx(expected, rel=1e-6)
    # A mean over the tokens of all chosen responses, however they are shared among micro-batches.
    chosen = logps[0::2][batch.loss_mask[0::2]]
    assert loss.terms["sft"].item() / weights["sft"] == pytest.approx(-0.7 * chosen.mean().item(), rel=1e-6)
    found, count = loss.metrics["rewards/margin"]
    assert found.tolist() == pytest.approx(margins, rel=1e-4, abs=1e-6) and count == 4  # type: ignore[union-attr]
    assert loss.metrics["accuracy"][0].tolist() == [float(margin > 0) for margin in margins]  # type: ignore[union-attr]
    assert float(loss.metrics["logps/chosen"][0]) == pytest.approx(float(logps[0::2].sum()), rel=1e-5)
    bare = built(CPOTrainer, sft_weight=0)
    assert set(bare.weights(batch)) == set(bare.loss(batch).terms) == {"preference"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "`beta`: must be greater than 0"),
        ({"sft_weight": -1}, "`sft_weight`: must be greater than or equal to 0"),
        ({"label_smoothing": 0.5}, "`label_smoothing`: must be less than 0.5"),
        ({"gamma": 0.5}, "unknown option `gamma`"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    assert_refused(CPOConfig, options, message)


class TestCPO(TrainerContract):
    method = "cpo"


@pytest.mark.slow
class TestCPOWithoutImitation(TrainerContract):
    method = "cpo"
    options: ClassVar = {"sft_weight": 0.0, "beta": 0.3, "label_smoothing": 0.1}
