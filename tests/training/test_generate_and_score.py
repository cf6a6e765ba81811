"""Completions are scored while others are still drawn, and the run reports what that took."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.config.online import OnlineConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.infra.errors import PluginError
from rlhf_core.rewards import Rewards, WeightedReward, as_reward
from rlhf_core.training.context import RunContext

SECONDS = 0.15
"""How long the engine of these tests takes for one completion."""


class SlowEngine:
    """Draws one completion after the other, the last prompt's first."""

    def __init__(self) -> None:
        self.drawing = False

    def generate(self, batch: Batch, n: int, sampling: Any, *, finished: Any) -> list[list[Completion]]:
        drawn = [
            [Completion(f"{prompt}.{k}", [k], [0.0], "end") for k in range(n)] for prompt in range(len(batch.rows))
        ]
        self.drawing = True
        for prompt in reversed(range(len(drawn))):
            for k in reversed(range(n)):
                time.sleep(SECONDS)
                finished(prompt, k, drawn[prompt][k])
        self.drawing = False
        return drawn


class Context(RunContext):
    @property
    def engine(self) -> Any:
        return self.trainer.engine  # type: ignore[attr-defined]


def context(*rewards: WeightedReward) -> Context:
    trainer: Any = SimpleNamespace(engine=SlowEngine(), config=OnlineConfig())
    parts: Any = SimpleNamespace()
    return Context(trainer, parts, parts, parts, Rewards(rewards))


def batch(prompts: int) -> Batch:
    ids = torch.ones(prompts, 1, dtype=torch.long)
    empty = torch.zeros(0, 0, dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        prompt_ids=ids,
        prompt_lengths=torch.ones(prompts, dtype=torch.long),
        response_ids=empty,
        response_lengths=none,
        owner=none,
        loss_mask=empty.bool(),
        rows=tuple(range(10, 10 + prompts)),
        prompts=tuple(f"p{number}" for number in range(prompts)),
        records=tuple({"answer": str(number)} for number in range(prompts)),
    )


def test_slow_rewards_score_while_others_are_drawn() -> None:
    run = context()
    overlapped: list[bool] = []
    groups: list[list[str]] = []

    async def slow(completions: list[str], answer: list[str]) -> list[float]:
        groups.append(list(completions))
        overlapped.append(run.engine.drawing)
        await asyncio.sleep(2 * SECONDS)
        return [float(text) for text in completions]

    def cheap(completions: list[str], answer: list[str]) -> list[float]:
        assert threading.current_thread() is threading.main_thread() and not run.engine.drawing
        return [float(right) for right in answer]

    run.rewards = Rewards([WeightedReward("slow", as_reward(slow)), WeightedReward("cheap", as_reward(cheap), 10.0)])
    began = time.monotonic()
    completions, scores = run.generate_and_score(batch(3), 2)
    seconds = time.monotonic() - began
    assert [[one.text for one in group] for group in completions] == [["0.0", "0.1"], ["1.0", "1.1"], ["2.0", "2.1"]]
    assert scores.by_name == {"slow": [0.0, 0.1, 1.0, 1.1, 2.0, 2.1], "cheap": [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]}
    assert scores.total.tolist() == pytest.approx([0, 0.1, 11, 11.1, 22, 22.1])
    assert groups[0] == ["2.0", "2.1"] and overlapped[:2] == [True, True]  # a prompt's completions together, at once
    assert seconds < 6 * SECONDS + 2 * SECONDS + 1  # only the last prompt's are waited for
    logged = run.logged()
    assert logged["reward"] == (pytest.approx(66.3), 6) and logged["reward/slow"] == (pytest.approx(6.3), 6)
    assert logged["reward_seconds/slow"][0] >= 4 * SECONDS and logged["reward_seconds/cheap"][0] < SECONDS
    assert logged["reward_seconds"][0] < 5 * SECONDS


def test_the_scores_are_those_of_scoring_afterwards() -> None:
    async def slow(completion: str, answer: str) -> float:
        await asyncio.sleep(0.01 * float(completion))
        return float(completion) + int(answer)

    run = context(WeightedReward("slow", as_reward(slow)))
    completions, together = run.generate_and_score(batch(2), 2)
    assert run.score(batch(2), completions).by_name == together.by_name


def test_a_reward_that_fails_ends_generation() -> None:
    run = context(WeightedReward("broken", as_reward(lambda completion: 1 / 0), runs_in="thread"))
    began = time.monotonic()
    with pytest.raises(PluginError, match="reward `broken`, row 19: the reward raised an error; got ZeroDivisionError"):
        run.generate_and_score(batch(10), 2)
    assert time.monotonic() - began < 10 * SECONDS  # of 20
