"""ORPO: golden numbers, limits, signs, float64, TRL's own code, its terms on a model, and the contract."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import random_batch, relative
from hypothesis import given
from hypothesis import strategies as st
from rlhf_plugins.trainers.orpo import ORPOConfig, ORPOTrainer, log1mexp, log_odds, orpo_loss
from torch import Tensor
from trainers_helpers import assert_refused, assert_same, built

from rlhf_core.testing import TrainerContract


def means(seed: int = 0, pairs: int = 7, scale: float = 4.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(-scale * torch.rand(pairs, generator=generator) - 1e-3).requires_grad_() for _ in range(2)]


def check(values: list[Tensor]) -> None:
    """Compare with the paper's equations 4, 7 and, for the gradient, 8 to 10, in float64."""
    found = orpo_loss(values[0], values[1])
    chosen, rejected = (value.detach().double() for value in values)
    # 1 − p by expm1: 1 − exp(x) has no digits left near x = 0, in float64 either.
    chosen_odds, rejected_odds = (x.exp() / -torch.expm1(x) for x in (chosen, rejected))
    expected = torch.log1p(rejected_odds / chosen_odds)
    assert relative(found.double(), expected) < 1e-6
    share = 1 / (1 + chosen_odds / rejected_odds)
    slopes = torch.stack([share / torch.expm1(chosen), -share / torch.expm1(rejected)])
    assert relative(torch.stack(torch.autograd.grad(found.sum(), values)).double(), slopes) < 1e-6


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_loss_and_gradient_equal_float64(scale: float) -> None:
    check(means(scale=scale))


NATS = st.floats(-12.0, -(2.0**-10), width=32)


@given(st.lists(st.tuples(NATS, NATS), min_size=1, max_size=8))
def test_any_pairs_equal_float64(pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = (torch.tensor(column) for column in zip(*pairs, strict=True))
    odds = [values.double().exp() / -torch.expm1(values.double()) for values in (chosen, rejected)]
    expected = torch.log1p(odds[1] / odds[0])
    # The log-odds are rounded before their difference is taken, so a small loss holds absolutely, not relatively.
    difference = (orpo_loss(chosen, rejected).double() - expected).abs().max()
    assert float(difference) < 2e-6 * max(1.0, float(expected.max()))


def test_loss_equals_trl() -> None:
    trl = pytest.importorskip("trl.experimental.orpo", reason="TRL isn't installed (extra `oracles`)")
    values = means(1)
    stub = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    theirs, rewards, *_ = trl.ORPOTrainer.odds_ratio_loss(stub, *values)  # TRL subtracts it from the likelihood's loss
    ours = 0.1 * orpo_loss(*values)
    assert torch.equal(rewards, 0.1 * values[0].detach())
    assert_same(ours, -theirs, values)


@given(st.floats(-100.0, -(2.0**-23), width=32))
def test_log1mexp_keeps_its_digits(value: float) -> None:
    found = log1mexp(torch.tensor(value)).item()
    expected = math.log(-math.expm1(value)) if value > -1 else math.log1p(-math.exp(value))
    assert found == pytest.approx(expected, rel=2e-6, abs=1e-37)


def loss_of(chosen: float, rejected: float) -> float:
    return orpo_loss(torch.tensor(chosen).log(), torch.tensor(rejected).log()).item()


def test_golden_numbers() -> None:
    # Odds 4 to 1, by probabilities 4/5 and 1/2: log(1 + 1/4).
    assert loss_of(0.8, 0.5) == pytest.approx(math.log(1.25), rel=1e-6)
    assert loss_of(0.5, 0.8) == pytest.approx(math.log(5), rel=1e-6)
    assert loss_of(0.3, 0.3) == pytest.approx(math.log(2), rel=1e-6)
    assert log_odds(torch.tensor(0.5).log()).item() == pytest.approx(0.0, abs=1e-6)
    # Of rare responses the odds are the probabilities: log(1 + 1e-6 / 1e-4).
    assert loss_of(1e-4, 1e-6) == pytest.approx(math.log1p(0.01), rel=1e-3)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    values = [torch.tensor([0.5]).log().requires_grad_() for _ in range(2)]
    chosen, rejected = torch.autograd.grad(orpo_loss(*values).sum(), values)
    # σ(0) / (1 − 1/2)
    assert chosen.item() == pytest.approx(-1.0, rel=1e-6) and rejected.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-500.0, -1.0), (-1e-12, -500.0)]
)
def test_certain_and_impossible_responses_stay_finite(chosen: float, rejected: float) -> None:
    values = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    loss = orpo_loss(*values)
    slopes = torch.stack(torch.autograd.grad(loss.sum(), values))
    assert bool(loss.isfinite()) and bool(slopes.isfinite().all())
    if chosen == rejected:
        assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_terms_and_metrics_on_a_model() -> None:
    made, batch = built(ORPOTrainer, beta=0.25), random_batch(4, 2)
    logps = made.policy.token_logps(batch).detach().double()
    averages = [float(row[mask].mean()) for row, mask in zip(logps, batch.loss_mask, strict=True)]
    loss = made.loss(batch)
    assert made.weights(batch) == {"sft": 4, "preference": 4}
    odds = [math.exp(value) / (1 - math.exp(value)) for value in averages]
    expected = 0.25 * sum(math.log1p(odds[2 * pair + 1] / odds[2 * pair]) for pair in range(4))
    assert loss.terms["preference"].item() == pytest.approx(expected, rel=1e-6)
    assert loss.terms["sft"].item() == pytest.approx(-sum(averages[0::2]), rel=1e-6)
    found, count = loss.metrics["rewards/margin"]
    margins = [0.25 * (averages[2 * pair] - averages[2 * pair + 1]) for pair in range(4)]
    assert found.tolist() == pytest.approx(margins, rel=1e-4, abs=1e-6) and count == 4  # type: ignore[union-attr]
    assert loss.metrics["accuracy"][0].tolist() == [float(margin > 0) for margin in margins]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "`beta`: must be greater than 0"),
        ({"label_smoothing": 0.1}, "unknown option `label_smoothing`"),
        ({"bta": 0.1}, "unknown option `bta`; fix: did you mean `beta`?"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    assert_refused(ORPOConfig, options, message)


class TestORPO(TrainerContract):
    method = "orpo"
