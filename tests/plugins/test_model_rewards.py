"""Rewards by models: the contract, the same scores as in training, doubt, and texts that come again."""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rlhf_plugins.rewards.process_reward import ProcessRewardReward, ProcessRewardRewardConfig
from rlhf_plugins.rewards.reward_model import RewardModelReward, RewardModelRewardConfig

from rlhf_core import registry
from rlhf_core.data import SFTDataset
from rlhf_core.data.collate import collate
from rlhf_core.errors import ConfigError, DataError, ModelError
from rlhf_core.interfaces import Sample
from rlhf_core.models import ProcessRewardModel, RewardModel
from rlhf_core.testing import RewardContract
from rlhf_core.testing.arithmetic import Arithmetic, split_steps
from rlhf_core.testing.tiny import save_tiny


@functools.cache
def saved(kind: str) -> str:
    """A folder that lives as long as the tests, with a model of that kind."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf-rewards-"))
    tiny = save_tiny(folder / "tiny", hidden=32, heads=2, kv_heads=1)
    if kind == "process":
        ProcessRewardModel.from_pretrained(tiny, new_head=True, seed=1).save_pretrained(folder / "model")
    else:
        model = RewardModel.from_pretrained(tiny, new_head=True, members=1 if kind == "single" else 3, seed=1)
        model.centred = kind != "loose"
        model.save_pretrained(folder / "model")
    return str(folder / "model")


class TestRewardModelReward(RewardContract):
    method = "reward_model"

    def config(self) -> Any:
        return RewardModelRewardConfig(model=saved("ensemble"), doubt_weight=0.5)

    options = property(lambda self: {"model": saved("ensemble")})  # type: ignore[assignment]


class TestProcessRewardReward(RewardContract):
    method = "process_reward"

    def config(self) -> Any:
        return ProcessRewardRewardConfig(model=saved("process"), aggregation="product")

    options = property(lambda self: {"model": saved("process")})  # type: ignore[assignment]


def samples(count: int = 5) -> list[Sample]:
    return [Sample(row["prompt"], row["response"]) for row in Arithmetic().rows("sft", count)]


def test_scores_are_those_of_training() -> None:
    given = samples()
    model = RewardModel.from_pretrained(saved("ensemble")).eval()
    data = SFTDataset([{"prompt": s.prompt, "response": s.completion} for s in given], model.tokenizer)
    with torch.no_grad():
        scores = model.scores(collate([data[i] for i in range(len(given))]))
    plain, careful = (
        RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), doubt_weight=weight)).score(given)
        for weight in (0.0, 2.0)
    )
    assert plain == pytest.approx(scores.mean(dim=1).tolist(), rel=1e-5, abs=1e-6)
    assert careful == pytest.approx((scores.mean(dim=1) - 2 * scores.std(dim=1)).tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "loose",
            r"doubt_weight: .* aren't known to be centred.*got 0.5 for .*fix: train .* `centre_weight`",
        ),
        ("single", r"doubt_weight: a model of one member has no doubt; got 0.5 for .*ensemble.size"),
    ],
)
def test_doubt_that_means_nothing_is_refused(kind: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RewardModelReward(RewardModelRewardConfig(model=saved(kind), doubt_weight=0.5)).score(samples(1))
    assert len(RewardModelReward(RewardModelRewardConfig(model=saved(kind))).score(samples(1))) == 1


def test_a_text_that_comes_again_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), cache_size=6))
    forwarded: list[int] = []
    scores = RewardModel.scores
    monkeypatch.setattr(
        RewardModel, "scores", lambda self, batch: (forwarded.append(batch.num_responses), scores(self, batch))[1]
    )
    given = samples(4)
    first = reward.score([*given, given[0]])
    assert forwarded == [4] and first[0] == first[4]
    assert reward.score(given[::-1]) == first[3::-1] and forwarded == [4]
    reward.score(samples(9)[4:])  # five more than there is room for: the oldest are forgotten
    assert len(reward._scores.cache) == 6


def test_samples_of_one_prompt_share_it_and_passes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), batch_tokens=60))
    seen: list[tuple[int, int]] = []
    scores = RewardModel.scores

    def noted(self: RewardModel, batch: Any) -> torch.Tensor:
        seen.append((batch.num_prompts, batch.num_tokens))
        return scores(self, batch)

    monkeypatch.setattr(RewardModel, "scores", noted)
    reward.score([Sample("2+2=", str(number)) for number in range(8)])
    assert seen == [(1, 1 + 4 + 8 * 2)]
    seen.clear()
    reward.score(samples(6))
    assert len(seen) > 1 and all(prompts == 1 or tokens <= 60 for prompts, tokens in seen)


def test_an_empty_completion_has_a_score() -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble")))
    assert len(set(reward.score([Sample("2+2=", ""), Sample("2+2=", "4")]))) == 2


def test_a_prompt_without_room_is_told() -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), max_length=8))
    with pytest.raises(DataError, match=r"sample 0: can't be scored.*raise `max_length`"):
        reward.score([Sample("a long prompt", "4")])


def test_completions_that_are_cut_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), max_length=16))
    given = [Sample("1+1=", text) for text in ("2", "9" * 20, "3" * 30, "3" * 8)]
    reward.score(given[::3])
    assert not _ours(caplog)
    reward.score(given)
    reward.score([Sample("1+2=", "9" * 20)])
    # Of the four, two had a score already.
    said = (
        "2 of 2 samples are longer than 16 tokens and scored without their ends (this is said once): raise `max_length`"
    )
    assert _ours(caplog) == [said]


def _ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the core warned of: it says other things, too, and so do the libraries below."""
    ours = (one for one in caplog.records if one.name.startswith("rlhf_core") and one.levelno >= logging.WARNING)
    return [record.getMessage() for record in ours]


def test_a_completion_beyond_the_models_positions_is_told(caplog: pytest.LogCaptureFixture) -> None:
    reward = RewardModelReward(RewardModelRewardConfig(model=saved("ensemble"), max_length=100_000))
    positions = reward.model.max_positions
    assert positions is not None
    reward.score([Sample("1+1=", "9" * positions), Sample("1+1=", "2")])
    assert f"1 of 2 samples are longer than {positions} tokens" in caplog.text
    assert f"use shorter completions, for the model has {positions} positions" in caplog.text


def test_steps_have_probabilities() -> None:
    given = samples()
    steps = ProcessRewardReward(ProcessRewardRewardConfig(model=saved("process"))).score_steps(given)
    assert [len(of_sample) for of_sample in steps] == [len(split_steps(s.completion)) for s in given]
    assert all(0 < value < 1 for of_sample in steps for value in of_sample)


@pytest.mark.parametrize("name", ["reward_model", "process_reward"])
def test_a_model_without_a_head_is_refused(name: str, tmp_path: Path) -> None:
    cls: Any = registry.get("reward", name)
    with pytest.raises(ModelError, match="its scores would be random"):
        cls(cls.Config(model=str(save_tiny(tmp_path / "tiny", hidden=32)))).score(samples(1))
    with pytest.raises(ConfigError, match="`model` is missing"):
        cls.Config.parse({})
