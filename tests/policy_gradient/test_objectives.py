"""Ratios, clips, corrections, aggregations and KL estimates: hand numbers, float64 written out, TRL's, gradients and limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core.policy_gradient import (
    CLIPS,
    CORRECTIONS,
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    RATIOS,
    PolicyTerms,
    clipped_tokens,
)

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])


def given(advantages: list[float] | None = None, scale: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return log π with gradient, log π_old and advantages of three completions, float64."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(3, 3, generator=generator, dtype=torch.float64)
    logps = (old + scale * torch.randn(3, 3, generator=generator, dtype=torch.float64)).clamp(max=0).requires_grad_()
    column = torch.tensor(advantages or [1.5, -0.5, -2.0], dtype=torch.float64)[:, None]
    return logps, old, column.expand(3, 3)


def terms(logps: Tensor, old: Tensor, advantages: Tensor, ratio: str = "token") -> PolicyTerms:
    log_ratio = RATIOS.get(ratio)(torch.where(MASK, logps - old, 0.0), MASK)
    return PolicyTerms(logps, old, log_ratio, advantages, MASK)


# Ratios


def test_ratios_by_hand() -> None:
    log_ratio = torch.tensor([[0.1, 0.2, 0.6], [0.3, 0.0, 0.0], [-0.4, 0.2, 0.0]])
    assert RATIOS.get("token")(log_ratio, MASK) is log_ratio
    rows = RATIOS.get("sequence")(log_ratio, MASK)
    assert rows.tolist() == [pytest.approx([0.9] * 3), pytest.approx([0.3, 0, 0]), pytest.approx([-0.2, -0.2, 0])]
    rows = RATIOS.get("geometric")(log_ratio, MASK)
    assert rows.tolist() == [pytest.approx([0.3] * 3), pytest.approx([0.3, 0, 0]), pytest.approx([-0.1, -0.1, 0])]


def test_gspo_token_has_the_value_of_gspo_and_the_gradient_of_the_token() -> None:
    logps, old, _ = given()
    log_ratio = torch.where(MASK, logps - old, 0.0)
    token, sequence = RATIOS.get("geometric_token")(log_ratio, MASK), RATIOS.get("geometric")(log_ratio, MASK)
    torch.testing.assert_close(token * MASK, sequence)
    (gradient,) = torch.autograd.grad((token * MASK).sum(), logps)
    assert gradient.tolist() == MASK.double().tolist()


# Clips


def straight(name: str, ratio: float, advantage: float, logp: float, old: float) -> float:
    """Return the objective of one token with the part's default options."""
    if name == "none":
        return ratio * advantage
    if name == "ppo":
        return min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    if name == "two_sided":
        clipped = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        return max(clipped, 3 * advantage) if advantage < 0 else clipped
    if name == "cispo":
        return min(ratio, 5.0) * advantage * logp
    if name == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
    assert name == "dppo"
    far = abs(math.exp(logp) - math.exp(old)) > 0.15
    return 0.0 if far and (ratio - 1) * advantage > 0 else ratio * advantage


@pytest.mark.parametrize("name", ["none", "ppo", "two_sided", "cispo", "sapo", "dppo"])
@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_clips_as_written_out(name: str, scale: float) -> None:
    logps, old, advantages = given(scale=scale)
    found = CLIPS.get(name)(terms(logps, old, advantages))
    for row, column in MASK.nonzero().tolist():
        logp, before, advantage = (float(one[row, column].detach()) for one in (logps, old, advantages))
        wanted = straight(name, math.exp(logp - before), advantage, logp, before)
        assert float(found[row, column].detach()) == pytest.approx(wanted, rel=1e-9), (row, column)


@pytest.mark.parametrize("name", sorted({"none", "ppo", "two_sided", "cispo", "sapo", "dppo", "gmpo"}))
def test_on_policy_every_clip_has_the_policy_gradient(name: str) -> None:
    """At ρ = 1 the gradient by log π, averaged over a completion's tokens, is A."""
    logps, _, advantages = given(scale=0.0)
    objective = CLIPS.get(name)(terms(logps, logps.detach(), advantages))
    weights, _ = LOSS_AGGREGATIONS.get("sequence_mean")(MASK, limit=3)
    (gradient,) = torch.autograd.grad((weights * objective).sum(), logps)
    torch.testing.assert_close(gradient, (weights * advantages).double(), rtol=1e-6, atol=1e-9)


def test_clips_by_hand() -> None:
    def one(name: str, ratio: float, advantage: float, **options: Any) -> float:
        old = torch.tensor([[math.log(0.25)]])
        logps, mask = old + math.log(ratio), torch.ones(1, 1, dtype=torch.bool)
        found = PolicyTerms(logps, old, logps - old, torch.tensor([[advantage]]), mask)
        return float(CLIPS.bind(name, options)(found))

    assert one("ppo", 1.5, 1.0) == pytest.approx(1.2) and one("ppo", 1.5, -1.0) == pytest.approx(-1.5)
    assert one("ppo", 0.5, 1.0) == pytest.approx(0.5) and one("ppo", 0.5, -1.0) == pytest.approx(-0.8)
    assert one("ppo", 1.5, 1.0, high=0.28) == pytest.approx(1.28)
    assert one("two_sided", 4.0, -1.0) == pytest.approx(-3.0) and one("two_sided", 2.0, -1.0) == pytest.approx(-2.0)
    assert one("sapo", 1.0, 1.0) == pytest.approx(2.0)  # 4 σ(0)
    assert one("cispo", 3.0, 1.0) == pytest.approx(3 * math.log(0.75))
    assert one("cispo", 3.0, 1.0, high=1.0) == pytest.approx(2 * math.log(0.75))
    # The probability rises from 0.25 to 0.375, by 0.125: within 0.15, though the ratio is 1.5.
    assert one("dppo", 1.5, 1.0) == pytest.approx(1.5) and one("dppo", 1.7, 1.0) == 0
    assert one("dppo", 1.7, -1.0) == pytest.approx(-1.7)
    # KL between (0.25, 0.75) and (0.5, 0.5): 0.25 log ½ + 0.75 log 1.5 = 0.1308 nats.
    assert one("dppo", 2.0, 1.0, divergence="kl", high=0.131) == pytest.approx(2.0)
    assert one("dppo", 2.0, 1.0, divergence="kl", high=0.130) == 0
    # 0.25 log ⅔ + 0.75 log 1.2 = 0.0354: within the 0.05 that is the default for the KL.
    assert one("dppo", 1.5, 1.0, divergence="kl") == pytest.approx(1.5) and one("dppo", 2.0, 1.0, divergence="kl") == 0
    # e^0.4 where the log-ratio would gain from going beyond 0.4, the ratio itself elsewhere.
    assert one("gmpo", 2.0, 1.0) == pytest.approx(math.exp(0.4)) and one("gmpo", 2.0, -1.0) == pytest.approx(-2.0)
    assert one("gmpo", 0.5, -1.0) == pytest.approx(-math.exp(-0.4))


def test_gmpo_as_written_out() -> None:
    logps, old, advantages = given(scale=1.0)
    found = CLIPS.get("gmpo")(terms(logps, old, advantages))
    for row in range(3):
        tokens = MASK[row].nonzero().flatten().tolist()
        advantage = float(advantages[row, 0])
        product = 1.0
        for token in tokens:
            ratio = math.exp(float((logps - old)[row, token].detach()))
            bounded = min(max(ratio, math.exp(-0.4)), math.exp(0.4))
            product *= min(ratio, bounded) if advantage > 0 else max(ratio, bounded)
        wanted = advantage * product ** (1 / len(tokens))
        assert found[row, tokens].tolist() == pytest.approx([wanted] * len(tokens), rel=1e-9)


@pytest.mark.parametrize("name", CLIPS.names())
def test_ratios_beyond_every_bound_have_finite_gradients(name: str) -> None:
    old = torch.tensor([[-500.0, -1e-4]])
    logps = torch.tensor([[-1e-4, -500.0]], requires_grad=True)
    for advantage in (1.0, -1.0):
        given = PolicyTerms(logps, old, logps - old, torch.full((1, 2), advantage), torch.ones(1, 2, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(CLIPS.get(name)(given).sum(), logps)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("none", [[0, 0, 0]]), ("ppo", [[1, 0, 0]]), ("cispo", [[0, 0, 0]]), ("sapo", [[0, 0, 0]]), ("gmpo", [[1, 0, 0]]),
        ("dppo", [[1, 0, 0]]),
    ],
)  # fmt: skip
def test_which_tokens_a_clip_holds_back(name: str, wanted: list[list[int]]) -> None:
    old = torch.tensor([[0.4, 0.4, 0.4]]).log()
    logps = torch.tensor([[0.7, 0.41, 0.2]]).log()
    given = PolicyTerms(logps, old, logps - old, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert clipped_tokens(CLIPS.get(name), given).int().tolist() == wanted


# Corrections


def test_corrections_by_hand() -> None:
    weights = torch.tensor([[0.4, 1.0, 3.0], [1.5, 9.0, 9.0], [2.0, 3.0, 9.0]])
    engine = torch.full((3, 3), -1.0)
    trainer = engine + weights.log()

    def found(name: str, **options: Any) -> list[list[float]]:
        made = CORRECTIONS.bind(name, options)(trainer.requires_grad_(), engine, MASK)
        assert not made.requires_grad
        return [[round(value, 4) for value, inside in zip(row, kept, strict=True) if inside]
                for row, kept in zip(made.tolist(), MASK.tolist(), strict=True)]  # fmt: skip

    assert found("none") == [[1, 1, 1], [1], [1, 1]]
    assert found("token_truncated") == [[0.4, 1, 2], [1.5], [2, 2]]
    assert found("token_masked", cap=2.5) == [[0.4, 1, 0], [1.5], [2, 0]]
    # Products 1.2, 1.5, 6.
    assert found("sequence_truncated") == [[1.2] * 3, [1.5], [2, 2]]
    assert found("sequence_masked") == [[1.2] * 3, [1.5], [0, 0]]
    assert found("icepop") == [[0, 1, 3], [1.5], [2, 3]]
    assert found("icepop", low=1.2, high=2.5) == [[0, 0, 0], [1.5], [2, 0]]


@pytest.mark.parametrize("name", CORRECTIONS.names())
def test_without_a_gap_nothing_is_corrected(name: str) -> None:
    logps = torch.tensor([[-1.0, -200.0, -3.0]] * 3)
    assert CORRECTIONS.get(name)(logps, logps, MASK).tolist() == [[1.0] * 3] * 3
    assert CORRECTIONS.get(name)(logps + 800, logps - 800, MASK).isnan().sum() == 0


# Aggregations


def test_aggregations_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [5.0, 9.0, 9.0], [2.0, 4.0, 9.0]])

    def loss(name: str, mask: Tensor = MASK) -> float:
        weights, amounts = LOSS_AGGREGATIONS.get(name)(mask, limit=10)
        return float((weights * values).sum() / amounts.sum())

    # Sums 9, 5, 6 of 3, 1, 2 tokens.
    assert loss("token") == pytest.approx(20 / 6)
    assert loss("sequence_mean") == pytest.approx((3 + 5 + 3) / 3)
    assert loss("sequence_sum") == pytest.approx(20 / 3)
    assert loss("constant") == pytest.approx(20 / 3 / 10)
    # A completion that is masked counts in neither: numerator and denominator are those of the others.
    masked = MASK & torch.tensor([True, False, True])[:, None]
    assert loss("token", masked) == pytest.approx(15 / 5)
    assert loss("sequence_mean", masked) == pytest.approx((3 + 3) / 2)
    assert loss("sequence_sum", masked) == pytest.approx(15 / 2)
    assert loss("constant", masked) == pytest.approx(15 / 2 / 10)


@pytest.mark.parametrize("name", LOSS_AGGREGATIONS.names())
def test_rows_can_be_divided_in_any_way(name: str) -> None:
    aggregate = LOSS_AGGREGATIONS.get(name)
    weights, amounts = aggregate(MASK, limit=7)
    parts = [aggregate(MASK[at : at + 1], limit=7) for at in range(3)]
    assert torch.equal(weights, torch.cat([part[0] for part in parts]))
    assert torch.equal(amounts, torch.cat([part[1] for part in parts]))


# KL estimates


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, old, ref = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    return logits.requires_grad_(), old.log_softmax(0), ref.log_softmax(0)


@pytest.mark.parametrize("name", ["k1", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_k1_and_k3_are_unbiased(name: str, off_policy: bool) -> None:
    """Averaged over what is sampled from, their value is KL(π ‖ π_ref), and with the ratio the gradient is its gradient."""
    logits, old, ref = distributions()
    logps = logits.log_softmax(0)
    sampled = old if off_policy else logps.detach()
    exact = (logps.exp() * (logps - ref)).sum()
    found = (sampled.exp() * KL_ESTIMATORS.get(name)(logps, ref, logps - sampled)).sum()
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(*(torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (found, exact)))


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_gradient_of_k2_is_that_of_the_kl(off_policy: bool) -> None:
    logits, old, ref = distributions()
    logps = logits.log_softmax(0)
    sampled = old if off_policy else logps.detach()
    exact = (logps.exp() * (logps - ref)).sum()
    found = (sampled.exp() * KL_ESTIMATORS.get("k2")(logps, ref, logps - sampled)).sum()
    torch.testing.assert_close(*(torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (found, exact)))


def test_without_the_ratio_k3_has_the_gradient_of_the_other_kl_and_k1_none() -> None:
    logits, _, ref = distributions()
    logps = logits.log_softmax(0)
    other = (ref.exp() * (ref - logps)).sum()
    k1, k3 = ((logps.detach().exp() * KL_ESTIMATORS.get(name)(logps, ref)).sum() for name in ("k1", "k3"))
    torch.testing.assert_close(*(torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (k3, other)))
    assert torch.autograd.grad(k1, logits)[0].abs().max() < 1e-12


def test_kl_estimates_by_hand() -> None:
    logps, ref = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert float(KL_ESTIMATORS.get("k1")(logps, ref)) == pytest.approx(math.log(2))
    assert float(KL_ESTIMATORS.get("k2")(logps, ref)) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(KL_ESTIMATORS.get("k3")(logps, ref)) == pytest.approx(0.5 - 1 + math.log(2))
    for name in ("k1", "k2", "k3"):
        assert float(KL_ESTIMATORS.get(name)(logps, logps)) == 0
