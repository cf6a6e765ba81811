"""Rewards made of rewards: scores by hand, what each part logs, the contract, and one call for each in Python."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlhf_plugins.rewards.constitutional import ConstitutionalRewardWrapper
from rlhf_plugins.rewards.reward_ensemble import COMBINATIONS, EnsembleReward

from rlhf_core import RewardFunctionFactory, RewardModel, registry
from rlhf_core.contracts.reward import RewardFn, Sample, ScoreWithParts
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.rewards import Rewards, checked_scores, open_rewards
from rlhf_core.testing import RewardContract
from rlhf_core.testing.tiny import save_tiny, tiny_policy

MEMBERS = [{"name": "numeric_answer"}, {"name": "length", "options": {"target": 20}}, "repetition"]


class TestEnsemble(RewardContract):
    method = "ensemble"
    options: ClassVar = {"members": MEMBERS}
    changes: ClassVar = {"members": MEMBERS[:2], "combine": "min", "doubt_weight": 0.5}


class TestConstitutional(RewardContract):
    method = "constitutional"
    options: ClassVar = {
        "objectives": ["numeric_answer", {"name": "length", "weight": 0.1, "options": {"target": 20}}],
        "constraints": [{"name": "repetition", "options": {"n": 1}, "at_least": -0.5}],
    }
    changes: ClassVar = {
        "objectives": ["numeric_answer"],
        "constraints": [{"name": "numeric_answer", "at_least": 1}],
    }


def a(completions: Sequence[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def b(completions: Sequence[str]) -> list[float]:
    return [float(text.count("b")) for text in completions]


def samples(*completions: str) -> list[Sample]:
    return [Sample("?", one) for one in completions]


@pytest.mark.parametrize(
    ("combine", "options", "expected"),
    [
        # aab: members 2 and 1, mean 1.5, variance 0.25; bbb: 0 and 3, mean 1.5, variance 2.25.
        ("mean", {}, [1.5, 1.5]),
        ("min", {}, [1.0, 0.0]),
        ("mean_less_std", {}, [1.0, 0.0]),
        ("mean_less_std", {"doubt_weight": 0.5}, [1.25, 0.75]),
        ("mean_less_variance", {"doubt_weight": 0.5}, [1.375, 0.375]),
    ],
)
def test_ensembles_by_hand(combine: str, options: dict[str, Any], expected: list[float]) -> None:
    scores = EnsembleReward.of([a, b], combine=combine, **options).score(samples("aab", "bbb"))
    assert scores == expected
    assert [dict(one.parts) for one in scores] == [  # type: ignore[attr-defined]
        {"a": 2.0, "b": 1.0, "std": 0.5},
        {"a": 0.0, "b": 3.0, "std": 1.5},
    ]


def test_a_members_weight_counts_in_mean_and_spread() -> None:
    (score,) = EnsembleReward.of([(a, 3.0), b], combine="mean_less_variance").score(samples("aaaa"))
    assert score == pytest.approx(3 - 3)  # mean 3 of (4, 4, 4, 0), variance 3


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.floats(0, 5))
def test_doubt_only_lowers_and_agreement_costs_nothing(scores: list[float], doubt: float) -> None:
    weights = [1.0] * len(scores)
    mean = COMBINATIONS["mean"](scores, weights, doubt)
    for name in ("mean_less_std", "mean_less_variance", "min"):
        assert COMBINATIONS[name](scores, weights, doubt) <= mean + 1e-9
        same = [scores[0]] * len(scores)
        assert COMBINATIONS[name](same, weights, doubt) == pytest.approx(scores[0], abs=1e-9)
    moved = [score + 7 for score in scores]
    less = COMBINATIONS["mean_less_std"]
    assert less(moved, weights, doubt) == pytest.approx(less(scores, weights, doubt) + 7, abs=1e-6)


def test_no_objective_buys_off_a_constraint() -> None:
    reward = ConstitutionalRewardWrapper.of(
        [(a, 2.0), (b, -1.0)], [(b, {"at_most": 1}), (len_of, {"at_least": 2})], floor=-3
    )
    scores = reward.score(samples("aab", "aaaabb", "a"))
    assert scores == [3.0, -3.0, -3.0]
    assert [dict(one.parts) for one in scores] == [  # type: ignore[attr-defined]
        {"a": 2.0, "b": 1.0, "kept/b": 1.0, "kept/len_of": 1.0, "kept": 1.0},
        {"a": 4.0, "b": 2.0, "kept/b": 0.0, "kept/len_of": 1.0, "kept": 0.0},
        {"a": 1.0, "b": 0.0, "kept/b": 1.0, "kept/len_of": 0.0, "kept": 0.0},
    ]


def len_of(completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_keeping_a_constraint_is_never_worse_than_violating_it(caplog: pytest.LogCaptureFixture) -> None:
    reward = ConstitutionalRewardWrapper.of([(b, -5.0)], [(len_of, {"at_least": 1})])
    with caplog.at_level(logging.WARNING):
        assert reward.score(samples("b", "", "c")) == [-1.0, -1.0, 0.0]
        reward.score(samples("b"))
    assert [record.message for record in caplog.records if "floor" in record.message] == [
        "a completion that keeps all constraints has objectives of -5, below the floor -1, which it gets: set a lower `floor`"
        " (reported once)"
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ensemble", {"members": ["repetition"]}, "members"),
        ("ensemble", {"members": MEMBERS, "combine": "median"}, "mean_less_std"),
        ("ensemble", {"members": MEMBERS, "combine": "min", "doubt_weight": 1}, "no meaning"),
        ("ensemble", {"members": ["repetition", {"name": "regex", "weight": 0}], "combine": "mean"}, "above 0"),
        (
            "ensemble",
            {"members": ["repetition", {"name": "numeric_answer", "weight": 2}], "combine": "min"},
            "no meaning",
        ),
        ("ensemble", {"members": ["repetition", "numeric_anser"]}, "numeric_answer"),
        ("constitutional", {"objectives": ["repetition"], "constraints": []}, "constraints"),
        ("constitutional", {"objectives": ["repetition"], "constraints": ["repetition"]}, "at_least"),
        (
            "constitutional",
            {"objectives": ["repetition"], "constraints": [{"name": "repetition", "at_least": 1, "at_most": 0}]},
            "no score",
        ),
        (
            "constitutional",
            {"objectives": ["repetition"], "constraints": [{"name": "repetition", "at_least": 0, "weight": 2}]},
            "weight has no meaning",
        ),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_rewards([{"name": name, "options": options}])


def test_parts_pass_through_rewards_and_processes() -> None:
    entry = {"name": "ensemble", "options": {"members": MEMBERS}, "weight": 2.0}
    asked = [
        Sample("2+2=?", "#### 4", columns={"answer": "4"}),
        Sample("2+2=?", "4 4 4 4 4 4", columns={"answer": "4"}),
    ]
    here = open_rewards([entry]).score(asked)
    apart = open_rewards([entry | {"runs_in": "process"}]).score(asked)
    assert here.by_name == apart.by_name and here.with_parts == apart.with_parts
    assert [*here.with_parts] == [
        "ensemble",
        *(f"ensemble/{one}" for one in ("numeric_answer", "length", "repetition", "std")),
    ]
    assert here.named(0)["ensemble/numeric_answer"] == 1.0
    assert here.total.tolist() == pytest.approx([2 * score for score in here.by_name["ensemble"]])
    assert {"reward", "reward/ensemble", "reward/ensemble/std"} <= here.per_prompt(1).keys()


def test_parts_must_be_finite_and_the_same_for_all() -> None:
    class Uneven(RewardFn):
        api = 1

        def score(self, samples: Sequence[Sample]) -> list[float]:
            return [ScoreWithParts(0.0, {one.completion: 1.0}) for one in samples]

    class Infinite(RewardFn):
        api = 1

        def score(self, samples: Sequence[Sample]) -> list[float]:
            return [ScoreWithParts(0.0, {"x": math.inf}) for _ in samples]

    with pytest.raises(PluginError, match="different parts"):
        checked_scores(Uneven(), samples("x", "y"))
    with pytest.raises(PluginError, match=r"finite number.*part `x`|part `x`.*finite number"):
        checked_scores(Infinite(), samples("x"))


def test_a_run_logs_every_part(tmp_path: Path) -> None:
    rewards = [
        {
            "name": "constitutional",
            "options": {
                "objectives": [{"name": "length", "options": {"target": 4, "unit": "characters"}}],
                "constraints": [{"name": "repetition", "options": {"n": 1}, "at_least": -0.9}],
            },
        }
    ]
    GRPO = registry.get("trainer", "grpo")
    config = {
        "rewards": rewards, "max_steps": 1, "batch_size": 4, "group_size": 4, "max_length": 32, "kl_weight": 0,
        "generation": {"max_new_tokens": 6}, "logging": {"progress": False},
    }  # fmt: skip
    rows = [{"prompt": f"{n}+1="} for n in range(8)]
    GRPO(GRPO.Config.parse(config), model=tiny_policy(), data=rows, output=tmp_path / "run").train()
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert {
        "reward/constitutional",
        "reward/constitutional/length",
        "reward/constitutional/kept/repetition",
    } <= row.keys()
    kept = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert all("constitutional/kept" in one["rewards"] for one in kept)


# One call each


def test_the_factory_makes_every_kind(tmp_path: Path) -> None:
    factory = RewardFunctionFactory
    assert {"ensemble", "constitutional", "numeric_answer"} <= {*factory.names()}
    assert type(factory.create("numeric_answer")).__name__ == "NumericAnswerReward"
    assert factory.create("length", target=3).config.target == 3  # type: ignore[attr-defined]
    assert factory.create(registry.get("reward", "length"), target=3).config.target == 3  # type: ignore[attr-defined]
    assert factory.create(a).score(samples("aa")) == [2.0]
    assert factory.create(times, factor=3.0).score(samples("aa")) == [6.0]
    given = factory.create("repetition")
    assert factory.create(given) is given
    with pytest.raises(ConfigError, match="takes no options"):
        factory.create(given, n=3)
    with pytest.raises(ConfigError, match="numeric_answer"):
        factory.create("numeric_anwser")
    with pytest.raises(ConfigError, match="isn't a model that scores"):
        factory.from_model(tiny_policy())


def times(completions: Sequence[str], factor: float = 1.0) -> list[float]:
    return [factor * len(text) for text in completions]


def test_the_factory_makes_ensembles_of_models(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        model = RewardModel.from_pretrained(save_tiny(tmp_path / f"base{seed}", seed, layers=1), new_head=True)
        model.save_pretrained(tmp_path / f"reward{seed}")
        paths.append(tmp_path / f"reward{seed}")
    asked = samples("four", "two and a half")
    each = [RewardFunctionFactory.create(path).score(asked) for path in paths]
    least = RewardFunctionFactory.ensemble(paths, combine="min")
    rewards = open_rewards(least)
    assert isinstance(rewards, Rewards)
    assert rewards.score(asked).by_name["ensemble"] == pytest.approx(
        [min(pair) for pair in zip(*each, strict=True)], abs=1e-5
    )
    held = RewardFunctionFactory.constitutional([paths[0]], [("repetition", {"at_least": -0.5})], floor=-1e6)
    assert held.score(asked) == pytest.approx(each[0], abs=1e-5)
    loaded = RewardModel.from_pretrained(paths[0], frozen=True)
    assert RewardFunctionFactory.from_model(loaded).score(asked) == pytest.approx(each[0], abs=1e-5)
