"""Shapings: DAPO's punishment of length and GDPO's normalised rewards, by hand and as written out."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from rlhf_core.policy_gradient import ADVANTAGES, SHAPINGS, RewardTerms


def terms(
    scores: list[list[float]], lengths: list[int], weights: list[float] | None = None, **other: Any
) -> RewardTerms:
    return RewardTerms(
        scores=torch.tensor(scores),
        weights=torch.tensor(weights or [1.0] * len(scores)),
        groups=torch.tensor([0, 0, 1, 1][: len(lengths)]),
        lengths=torch.tensor(lengths),
        limit=other.get("limit", 100),
    )


def test_overlong_by_hand() -> None:
    # L = 100, B = 20: none up to 80, −½ at 90, −1 at 100.
    found = SHAPINGS.get("overlong")(terms([[1.0, 1.0, 0.0, 0.0]], [10, 80, 90, 100], weights=[2.0]))
    assert found.total.tolist() == pytest.approx([2.0, 2.0, -0.5, -1.0])
    found = SHAPINGS.bind("overlong", {"buffer": 0.5, "penalty": 3})(terms([[1.0, 1.0, 0.0, 0.0]], [10, 50, 75, 100]))
    assert found.total.tolist() == pytest.approx([1.0, 1.0, -1.5, -3.0])


def test_overlong_is_equation_13() -> None:
    limit, buffer = 64, 0.25
    cache = int(buffer * limit)
    lengths = [1, 47, 48, 49, 55, 63, 64]
    given = RewardTerms(
        torch.zeros(1, 7), torch.ones(1), torch.zeros(7, dtype=torch.long), torch.tensor(lengths), limit
    )
    wanted = [0.0 if n <= limit - cache else (limit - cache - n) / cache if n <= limit else -1.0 for n in lengths]
    assert SHAPINGS.bind("overlong", {"buffer": buffer})(given).total.tolist() == pytest.approx(wanted)


def test_normalised_rewards_count_by_their_weights_alone() -> None:
    """GDPO: Σ_k w_k (r_k − mean)/std over each group; a reward's scale doesn't matter."""
    small, large = [1.0, 0.0, 0.5, 0.0], [0.0, 300.0, 100.0, 500.0]
    found = SHAPINGS.get("group_normalised")(terms([small, large], [1] * 4, weights=[1.0, 0.5])).total
    wanted = [
        sum(
            w * (row[at] - statistics.fmean(of)) / statistics.stdev(of)
            for w, row in ((1.0, small), (0.5, large))
            for of in [row[at // 2 * 2 : at // 2 * 2 + 2]]
        )
        for at in range(4)
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)


def test_gdpo_tells_apart_what_the_sum_of_rewards_does_not() -> None:
    """Rewards 1 + 0 and 0 + 1 of one sum: GRPO gives both no advantage against a third, GDPO's differ by their rarity."""
    correct, form = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]
    given = RewardTerms(
        torch.tensor([correct, form]), torch.ones(2), torch.zeros(4, dtype=torch.long), torch.ones(4), 100
    )
    plain = ADVANTAGES.get("group_mean_std")(given.total, given.groups)
    shaped = SHAPINGS.get("group_normalised")(given)
    gdpo = ADVANTAGES.get("batch_norm")(shaped.total, given.groups)
    assert plain[0] == plain[1] and gdpo[0] > gdpo[1] + 0.1


def test_equal_scores_are_normalised_to_nothing_without_an_epsilon() -> None:
    found = SHAPINGS.bind("group_normalised", {"epsilon": 0})(terms([[0.1, 0.1, 0.0, 1.0]], [1] * 4))
    assert found.total.tolist() == pytest.approx([0, 0, -(0.5**0.5), 0.5**0.5])
