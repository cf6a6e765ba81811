"""What online methods report of rollouts and updates: hand numbers, by sign, by right and wrong, over the whole step."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
import torch

from rlhf_core.config.online import right_threshold
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import Sample
from rlhf_core.plugin import logprob_gaps, online_metrics
from rlhf_core.rewards import Scores
from rlhf_core.training.completion_metrics import completion_metrics, pass_at_k
from rlhf_core.training.online_metrics import gap_metrics, rollout_metrics, with_deviations
from rlhf_core.training.phases import Phases, phase_metrics
from rlhf_core.training.reduction import quotients

LN2 = math.log(2)


def means(pairs: Any) -> dict[str, float]:
    return quotients({name: (float(total), float(count)) for name, (total, count) in pairs.items()})


@pytest.mark.parametrize("advantages", [torch.tensor([1.0, -1.0]), torch.tensor([[1.0], [-1.0]])])
def test_ratios_and_clip_shares_are_given_by_the_sign_of_the_advantage(advantages: torch.Tensor) -> None:
    """Ratios 2 and 1 where the advantage is positive, 1/2 where it is negative; one token isn't in the loss."""
    logps = torch.tensor([[LN2, 0.0], [-LN2, 5.0]])
    mask = torch.tensor([[True, True], [True, False]])
    clipped = torch.tensor([[True, False], [True, True]])
    found = means(
        online_metrics(
            logps=logps, old_logps=torch.zeros(2, 2), advantages=advantages, mask=mask, clipped=clipped,
            ref_logps=torch.full((2, 2), 1.0), weight=torch.tensor([[2.0, 1.0], [0.5, 9.0]]),
        )
    )  # fmt: skip
    assert found == pytest.approx(
        {
            "ratio": 3.5 / 3, "ratio_positive": 1.5, "ratio_negative": 0.5,
            "clipped": 2 / 3, "clipped_positive": 0.5, "clipped_negative": 1.0,
            # ρ − 1 − ln ρ: 1 − ln 2, 0 and ln 2 − ½
            "kl_sampled": 0.5 / 3,
            "kl": (2 * (LN2 - 1) - 1 + 0.5 * (-LN2 - 1)) / 3,
        },
        abs=1e-6,
    )  # fmt: skip


def test_what_lies_outside_the_loss_changes_nothing_and_no_token_gives_no_metric() -> None:
    mask = torch.tensor([[True, False]])
    values = {"old_logps": torch.zeros(1, 2), "advantages": torch.ones(1), "mask": mask}
    one, other = (online_metrics(logps=torch.tensor([[0.1, x]]), **values) for x in (math.nan, -math.inf))
    assert means(one) == means(other) and "ratio_negative" not in means(one)
    assert means(online_metrics(logps=torch.zeros(1, 2), **{**values, "mask": ~mask & mask})) == {}


def test_the_gap_is_the_mean_per_token_and_the_largest_of_a_completion() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    total, count = logprob_gaps(
        torch.tensor([[0.1, -0.1, 0.4], [0.3, 9.0, 9.0]]), torch.zeros(2, 3), mask
    )["logprob_gap"]  # fmt: skip
    pairs = list(zip(total.tolist(), count.tolist(), strict=True))
    assert gap_metrics([pairs[:1], pairs[1:], []]) == pytest.approx(
        {"logprob_gap": 0.9 / 4, "logprob_gap_max": 0.3}, abs=1e-6
    )
    assert gap_metrics([[], [(0.0, 0)]]) == {}


def drawn(length: int, stop: str = "end", logp: float = -0.5) -> Completion:
    return Completion("", [1] * length, [logp] * length, stop)


def test_a_rollout_reports_lengths_of_right_and_wrong_ones_entropy_and_groups_without_variance() -> None:
    completions = [drawn(2), drawn(4, "length", -1.0), drawn(6), drawn(8)]
    samples = [Sample("", "", group=group) for group in (0, 0, 1, 1)]
    rewards = [1.0, 0.2, 0.2, 0.2]
    found = with_deviations(quotients(rollout_metrics(samples, completions, rewards, right_from=0.6)))
    mean = 0.4
    assert found == pytest.approx(
        {
            "length": 5, "length_right": 2, "length_wrong": 6, "truncated": 0.25,
            "entropy": (16 * 0.5 + 4 * 1.0) / 20,
            "reward": mean, "reward_std": math.sqrt((0.6**2 + 3 * 0.2**2) / 4), "groups_without_variance": 0.5,
        }
    )  # fmt: skip
    assert rollout_metrics(samples, completions, None, right_from=0.6).keys() == {"length", "truncated", "entropy"}
    alone = [Sample("", "", group=0)]
    assert "groups_without_variance" not in quotients(rollout_metrics(alone, [drawn(1)], [1.0], right_from=0.5))


def test_half_of_what_can_be_reached_counts_as_right_unless_it_is_said() -> None:
    assert right_threshold(None, [1.0, 0.2, -5.0]) == pytest.approx(0.6)
    assert right_threshold(0.9, [1.0]) == 0.9


def test_phases_inside_others_are_apart_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 10.0, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    shown: list[str | None] = []
    phases = Phases(shown.append)
    with phases.phase("rollout"), phases.phase("reward"):
        phases.add_tokens("rollout", 30)
    with phases.phase("update", tokens=10):
        pass
    assert shown == ["rollout", "reward", "rollout", None, "update", None]
    taken = phases.take()
    assert taken == {"rollout": (2.0, 30), "reward": (2.0, 0), "update": (2.0, 10)}
    assert phases.shares() == pytest.approx(dict.fromkeys(taken, 1 / 3))
    assert phases.take() == {"rollout": (0.0, 0), "reward": (0.0, 0), "update": (0.0, 0)}
    # Of two processes the slower one counts, and the tokens of both.
    both = phase_metrics([taken, {"rollout": (4.0, 10)}])
    assert both["seconds/rollout"] == 4 and both["tokens_per_second/rollout"] == 10
    assert "tokens_per_second/reward" not in both


def test_a_method_without_rollouts_has_no_phases() -> None:
    phases = Phases()
    with phases.phase("update"):
        pass
    assert phases.take() == {} and phases.shares() == {}


@pytest.mark.parametrize(("n", "c", "k", "expected"), [(4, 0, 2, 0.0), (4, 4, 2, 1.0), (4, 1, 2, 0.5), (5, 2, 3, 0.9)])
def test_pass_at_k_is_the_share_of_choices_of_k_with_a_right_one(n: int, c: int, k: int, expected: float) -> None:
    right = [True] * c + [False] * (n - c)
    choices = list(itertools.combinations(right, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices)) == pytest.approx(expected)


def test_pass_at_k_needs_k_completions() -> None:
    with pytest.raises(ValueError, match="pass@3 can't be estimated from 2 completions"):
        pass_at_k(2, 1, 3)


def test_an_evaluation_counts_right_ones_per_prompt() -> None:
    """Two prompts of three completions, one and three of them right."""
    completions = [[drawn(2), drawn(4, "length"), drawn(6)], [drawn(1), drawn(1), drawn(1)]]
    total = torch.tensor([1.0, 0.1, 0.0, 0.8, 0.9, 1.0])
    scores = Scores(total, {"exact": total.tolist()}, [0, 0, 0, 1, 1, 1])
    pairs = completion_metrics(completions, scores, right_from=0.5)
    assert {name: total.shape for name, (total, _) in pairs.items()} == dict.fromkeys(pairs, (2,))
    found = {name: float(total.sum() / count.sum()) for name, (total, count) in pairs.items()}
    assert found == pytest.approx(
        {
            "reward": 3.8 / 6, "reward/exact": 3.8 / 6, "avg@3": 4 / 6, "pass@2": (2 / 3 + 1) / 2, "pass@3": 1.0,
            "length": 15 / 6, "truncated": 1 / 6,
        }
    )  # fmt: skip
    assert completion_metrics([], Scores(torch.zeros(0), {}, ()), right_from=0.5)["avg@1"][0].shape == (0,)
