"""Advantages, whitening, value losses and KL weights: by hand, against float64 sums written out, and in limiting cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import relative
from torch import Tensor

from rlhf_core.plugin import (
    adapted_kl_weight,
    explained_variance,
    generalized_advantages,
    token_rewards,
    value_loss,
    whitened,
)


def advantages_written_out(
    rewards: Tensor, values: Tensor, mask: Tensor, end_values: Tensor, gamma: float, lam: float
) -> Tensor:
    """Return Σ_l (γλ)^l δ_{t+l} (arXiv 1506.02438, equation 16) over the policy's tokens of each response, in float64."""
    found = torch.zeros(rewards.shape, dtype=torch.float64)
    for r in range(len(rewards)):
        places = [t for t in range(rewards.shape[1]) if mask[r, t]]
        states = [float(values[r, t]) for t in places] + [float(end_values[r])]
        deltas = [float(rewards[r, t]) + gamma * states[k + 1] - states[k] for k, t in enumerate(places)]
        for k, t in enumerate(places):
            found[r, t] = math.fsum((gamma * lam) ** (n - k) * deltas[n] for n in range(k, len(places)))
    return found


def random_case(seed: int, responses: int = 5, tokens: int = 12) -> dict[str, Tensor]:
    """Return rewards, values, end values, and a mask with a tool's tokens in the middle, padding, and an empty response."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, responses, tokens, generator=generator)
    mask = torch.rand(responses, tokens, generator=generator) < 0.6
    mask[0], mask[1], mask[2, 6:] = False, True, False
    mask[3, 3:7], mask[3, 2], mask[3, 7] = False, True, True
    return {
        "rewards": rewards,
        "values": values,
        "mask": mask,
        "end_values": torch.randn(responses, generator=generator),
    }


def test_advantages_by_hand() -> None:
    """γ = λ = ½. δ₂ = 4 + ½·0 − 2 = 2; δ₁ = 1 + ½·2 − 1 = 1, A₁ = 1 + ¼·2 = 1.5; δ₀ = 0 + ½·1 − 3 = −2.5, A₀ = −2.125."""
    rewards, values = torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[3.0, 1.0, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = generalized_advantages(rewards, values, mask, torch.zeros(1), gamma=0.5, lam=0.5)
    assert found.tolist() == [[-2.125, 1.5, 2.0]]
    # Truncated where 8 can still be had: δ₂ = 4 + ½·8 − 2 = 6, A₁ = 1 + ¼·6, A₀ = −2.5 + ¼·2.5.
    truncated = generalized_advantages(rewards, values, mask, torch.tensor([8.0]), gamma=0.5, lam=0.5)
    assert truncated.tolist() == [[-1.875, 2.5, 6.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (1.0, 1.0), (0.5, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_are_the_sums_of_the_paper(gamma: float, lam: float, dtype: torch.dtype) -> None:
    for seed in range(5):
        case = random_case(seed)
        expected = advantages_written_out(**case, gamma=gamma, lam=lam)
        narrow = {name: value if value.dtype == torch.bool else value.to(dtype) for name, value in case.items()}
        found = generalized_advantages(**narrow, gamma=gamma, lam=lam)
        assert found.dtype == dtype and not found[~case["mask"]].any()
        assert relative(found.double(), expected) < (1e-6 if dtype == torch.float32 else 1e-13)


def test_with_lambda_0_an_advantage_is_one_steps_error() -> None:
    case = random_case(3)
    case["mask"][:] = True
    found = generalized_advantages(**case, gamma=0.9, lam=0.0)
    following = torch.cat([case["values"][:, 1:], case["end_values"][:, None]], dim=1)
    assert torch.allclose(found, case["rewards"] + 0.9 * following - case["values"], atol=1e-6)


def test_with_lambda_1_an_advantage_is_the_discounted_return_less_the_value() -> None:
    case = random_case(4)
    case["mask"][:] = True
    found = generalized_advantages(**case, gamma=1.0, lam=1.0)
    returns = case["rewards"].flip(1).cumsum(1).flip(1) + case["end_values"][:, None]
    assert torch.allclose(found + case["values"], returns, atol=1e-5)


@pytest.mark.parametrize("odd", [1e30, math.inf, math.nan])
def test_what_stands_outside_the_mask_changes_nothing(odd: float) -> None:
    """A tool's output in the middle and padding: neither value, reward nor advantage leaks, and the result is that of the
    policy's tokens alone, side by side."""
    case = random_case(1)
    kept = generalized_advantages(**case, gamma=0.9, lam=0.8)
    for name in ("rewards", "values"):
        case[name] = torch.where(case["mask"], case[name], odd)
    assert torch.equal(generalized_advantages(**case, gamma=0.9, lam=0.8), kept)
    for r, inside in enumerate(case["mask"]):
        alone = {name: case[name][r, inside][None] for name in ("rewards", "values")}
        alone |= {
            "mask": torch.ones_like(alone["rewards"], dtype=torch.bool),
            "end_values": case["end_values"][r, None],
        }
        assert torch.equal(generalized_advantages(**alone, gamma=0.9, lam=0.8)[0], kept[r, inside])


def test_advantages_of_nothing() -> None:
    none = {"rewards": torch.zeros(0, 0), "values": torch.zeros(0, 0), "mask": torch.zeros(0, 0, dtype=torch.bool)}
    assert generalized_advantages(**none, end_values=torch.zeros(0)).shape == (0, 0)


def test_the_score_is_at_the_policys_last_token() -> None:
    mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    penalties = torch.full((2, 5), 0.5)
    penalties[0, 2] = math.nan
    found = token_rewards(torch.tensor([3.0, 5.0]), penalties, mask)
    assert found.tolist() == [[-0.5, -0.5, 0.0, 2.5, 0.0], [0.0] * 5]
    # Ziegler et al., equation 2: a response's rewards add up to its score less β log(π / ρ).
    assert float(found.sum()) == 3.0 - 3 * 0.5


def test_whitening_by_hand() -> None:
    assert whitened(torch.tensor([1.0, 5.0])).tolist() == [-1.0, 1.0]
    assert whitened(torch.tensor([1.0, 5.0]), keep_mean=True).tolist() == [2.0, 4.0]
    assert whitened(torch.tensor([7.0])).tolist() == [0.0] and whitened(torch.tensor([7.0]), keep_mean=True).item() == 7
    assert whitened(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -2e4, 1e-8])
def test_equal_values_are_not_scaled_up(value: float) -> None:
    """Their mean differs from them by rounding."""
    values = torch.full((1001,), value)
    assert not whitened(values).any()
    assert whitened(values, keep_mean=True).tolist() == pytest.approx([value] * 1001, rel=1e-6)


def test_whitening_against_float64() -> None:
    values = 3 + 0.01 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    exact = values.double()
    expected = (exact - exact.mean()) / exact.var(correction=0).sqrt()
    assert relative(whitened(values).double(), expected) < 1e-5
    assert relative(whitened(values, keep_mean=True).double(), expected + exact.mean()) < 1e-5
    # TRL divided by the deviation over N − 1.
    ours, theirs = whitened(values), (values - values.mean()) * torch.rsqrt(values.var() + 1e-8)
    assert relative(theirs, ours * math.sqrt(3999 / 4000)) < 1e-3


def test_value_losses_by_hand() -> None:
    """V = 1, V_old = 0, ε = 0.2: R = 2 gives ½ max(1, 1.8²), R = 0 gives ½ max(1, 0.2²); unclipped both give ½."""
    values, old, returns = torch.ones(2, requires_grad=True), torch.zeros(2), torch.tensor([2.0, 0.0])
    found = value_loss(values, old, returns, clip=0.2)
    assert found.tolist() == pytest.approx([1.62, 0.5], abs=1e-6)
    # It has moved up by more than ε: no gradient where that was the right way, the whole one where it was wrong.
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert gradient.tolist() == [0.0, 1.0]
    assert value_loss(values, old, returns, clip=None).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("clip", [None, 0.2, 1e9])
def test_value_losses_against_float64(clip: float | None) -> None:
    values, old, returns = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        errors = [(v - r) ** 2]
        if clip is not None:
            errors.append((min(max(v, o - clip), o + clip) - r) ** 2)
        expected.append(max(errors) / 2)
    found = value_loss(values, old, returns, clip=clip)
    assert relative(found.double(), torch.tensor(expected, dtype=torch.float64)) < 1e-6
    if clip == 1e9:
        assert relative(found, value_loss(values, old, returns, clip=None)) < 1e-6


@pytest.mark.parametrize(
    ("kl", "options", "expected"),
    [
        (2.0, {}, 1.0), (2.2, {}, 1.01), (2.4, {}, 1.02), (1e9, {}, 1.02), (1.9, {}, 0.995), (0.0, {}, 0.98), (-5.0, {}, 0.98),
        (1e9, {"gain": 1.0}, 1.2), (0.0, {"gain": 5.0}, 0.0),
    ],
)  # fmt: skip
def test_the_kl_weight_follows_its_target(kl: float, options: dict[str, Any], expected: float) -> None:
    assert adapted_kl_weight(1.0, kl, target=2.0, **options) == pytest.approx(expected)
    assert adapted_kl_weight(3.0, kl, target=2.0, **options) == pytest.approx(3 * expected)


def test_explained_variance_of_perfect_constant_and_wrong_values() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert float(explained_variance(returns, returns)) == 1
    assert float(explained_variance(returns + 5, returns)) == pytest.approx(1), "a constant error explains all variance"
    assert float(explained_variance(torch.full((4,), 9.0), returns)) == 0
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3)
    assert float(explained_variance(returns, torch.ones(4))) == 0 and float(explained_variance(*torch.zeros(2, 0))) == 0
