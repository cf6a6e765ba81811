"""Advantages: hand numbers, independent computation in float64, TRL's, limiting cases."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_core.infra.errors import ConfigError
from rlhf_core.policy_gradient import ADVANTAGES

REWARDS = [1.0, 0.0, 0.0, 3.0, 2.0, 0.5, 2.5]
GROUPS = [7, 7, 7, 7, 3, 3, 3]


def advantages(name: str, rewards: list[float], groups: list[int], **options: object) -> list[float]:
    return ADVANTAGES.bind(name, options)(torch.tensor(rewards), torch.tensor(groups)).tolist()


def by_group(rewards: list[float], groups: list[int]) -> list[list[float]]:
    """Return for each completion the rewards of its group."""
    return [[r for r, g in zip(rewards, groups, strict=True) if g == own] for own in groups]


def written_out(one: Callable[[float, list[float]], float]) -> list[float]:
    return [one(r, of) for r, of in zip(REWARDS, by_group(REWARDS, GROUPS), strict=True)]


EXPECTED: dict[str, list[float]] = {
    "none": REWARDS,
    "group_mean": written_out(lambda r, of: r - statistics.fmean(of)),
    "group_mean_std": written_out(lambda r, of: (r - statistics.fmean(of)) / statistics.stdev(of)),
    "leave_one_out": written_out(lambda r, of: r - (sum(of) - r) / (len(of) - 1)),
    "batch_norm": [(r - statistics.fmean(REWARDS)) / statistics.pstdev(REWARDS) for r in REWARDS],
    "group_mean_over_mean": written_out(lambda r, of: (r - statistics.fmean(of)) / statistics.fmean(of)),
}
CENTRED = EXPECTED["group_mean"]
EXPECTED["group_mean_batch_norm"] = [(a - statistics.fmean(CENTRED)) / statistics.pstdev(CENTRED) for a in CENTRED]


@pytest.mark.parametrize("name", EXPECTED)
def test_as_written_out_in_float64(name: str) -> None:
    assert advantages(name, REWARDS, GROUPS) == pytest.approx(EXPECTED[name], rel=2e-6, abs=1e-7)


def test_by_hand() -> None:
    # Group 1, 0, 0, 3: mean 1, sample deviation √(6/3) = √2.
    group = [7] * 4
    assert advantages("group_mean", REWARDS[:4], group) == [0, -1, -1, 2]
    found = advantages("group_mean_std", REWARDS[:4], group)
    assert found == pytest.approx([0, -1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)], rel=1e-5)
    assert advantages("leave_one_out", REWARDS[:4], group) == pytest.approx([0, -4 / 3, -4 / 3, 8 / 3])
    assert advantages("batch_norm", [1.0, 3.0], [0, 1]) == pytest.approx([-1, 1])
    # One of four is right: G/K − 1 = 3 for it, −1 for the others.
    assert advantages("group_mean_over_mean", [0.0, 1.0, 0.0, 0.0], group) == [-1, 3, -1, -1]


@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "leave_one_out", "group_mean_over_mean"])
def test_advantages_of_a_group_add_up_to_nothing(name: str) -> None:
    found = advantages(name, REWARDS, GROUPS)
    assert sum(found[:4]) == pytest.approx(0, abs=1e-6) and sum(found[4:]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", sorted({*EXPECTED, "pass_at_k"} - {"none"}))
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_equal_rewards_have_no_advantage(name: str, value: float) -> None:
    assert advantages(name, [value] * 5, [0] * 5) == pytest.approx([0] * 5, abs=1e-6)


@pytest.mark.parametrize("name", ["group_mean_std", "batch_norm", "group_mean_batch_norm"])
def test_equal_rewards_have_no_advantage_without_an_epsilon(name: str) -> None:
    assert advantages(name, [0.1] * 5, [0, 0, 0, 1, 1], epsilon=0) == [0] * 5
    rest = advantages(name, [0.1, 0.1, 1.0, 2.0], [0, 0, 1, 1], epsilon=0)
    assert all(math.isfinite(one) for one in rest) and rest[2] < rest[3]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_order_of_completions_changes_nothing(name: str) -> None:
    order = [3, 6, 0, 5, 2, 4, 1]
    found = advantages(name, [REWARDS[at] for at in order], [GROUPS[at] for at in order])
    assert found == pytest.approx([EXPECTED[name][at] for at in order], rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["group_mean_std", "leave_one_out"])
def test_a_group_of_one_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name} needs groups of at least 2; got a group of 1; fix: raise `group_size`"
    ):
        advantages(name, [1.0, 0.0, 1.0], [0, 0, 1])


def test_negative_rewards_have_no_share_of_a_mean() -> None:
    with pytest.raises(ConfigError, match="needs rewards of at least 0; got -1"):
        advantages("group_mean_over_mean", [1.0, -1.0], [0, 0])


@pytest.mark.parametrize(("right", "size", "k"), [(1, 4, 2), (2, 4, 2), (1, 6, 3), (3, 6, 4), (2, 5, 1)])
def test_pass_at_k_is_the_mean_over_all_sets_that_hold_a_completion(right: int, size: int, k: int) -> None:
    rewards = [1.0] * right + [0.0] * (size - right)
    sets = list(itertools.combinations(range(size), k))
    scores = [max(rewards[at] for at in chosen) for chosen in sets]
    mean = statistics.fmean(scores)
    deviation = math.sqrt(mean * (1 - mean))
    wanted = [
        statistics.fmean((score - mean) / deviation for score, chosen in zip(scores, sets, strict=True) if at in chosen)
        if deviation
        else 0.0
        for at in range(size)
    ]
    assert advantages("pass_at_k", rewards, [0] * size, k=k) == pytest.approx(wanted, abs=1e-6)


def test_pass_at_1_is_the_group_normalised_reward() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0]
    deviation = statistics.pstdev(rewards)
    assert advantages("pass_at_k", rewards, [0] * 4, k=1) == pytest.approx([(r - 0.25) / deviation for r in rewards])


def test_pass_at_k_by_hand() -> None:
    # One of four right, k = 2: R̄ = 1 − C(3,2)/C(4,2) = 1/2, σ = 1/2; right (1 − ½)/½ = 1; wrong (½ − C(2,1)/C(3,1))/½ = −1/3.
    assert advantages("pass_at_k", [1.0, 0.0, 0.0, 0.0], [0] * 4, k=2) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    with pytest.raises(ConfigError, match="pass_at_k with k = 4 needs groups of at least 4"):
        advantages("pass_at_k", [1.0, 0.0, 0.0], [0] * 3, k=4)


def test_maxrl_weights_are_the_gradient_of_the_likelihood_where_every_answer_is_sampled() -> None:
    """Averaged over a group that has each of its answers as often as the policy gives it, Σ A ∇log π / G = ∇ log p."""
    counts, right = [5, 3, 2], [True, False, True]  # of ten completions, each answer's share is its probability
    logits = torch.tensor(counts, dtype=torch.float64).log().requires_grad_()
    logps = logits.log_softmax(0)
    (exact,) = torch.autograd.grad(logps.exp()[torch.tensor(right)].sum().log(), logits, retain_graph=True)
    rewards = torch.tensor([float(r) for r, n in zip(right, counts, strict=True) for _ in range(n)])
    found = ADVANTAGES.get("group_mean_over_mean")(rewards, torch.zeros(10, dtype=torch.long)).double()
    index = torch.tensor([at for at, n in enumerate(counts) for _ in range(n)])
    (estimate,) = torch.autograd.grad((found * logps[index]).mean(), logits)
    torch.testing.assert_close(estimate, exact, rtol=1e-6, atol=1e-8)


def test_a_step_without_completions_has_no_advantages() -> None:
    for name in ADVANTAGES.names():
        empty: Tensor = ADVANTAGES.get(name)(torch.zeros(0), torch.zeros(0, dtype=torch.long))
        assert empty.shape == (0,)
