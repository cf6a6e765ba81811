"""GRPO and PPO learn: after seconds of training many more of a tiny model's sampled answers are right, and no fewer greedy ones.

What is asked is far below what was seen (0.46 → 0.68 and 0.71, ten standard errors; greedy 0.91 → 0.90), since another processor
rounds otherwise. Three quarters of a minute of one core for both.
"""

from __future__ import annotations

import math
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import PolicyModel, registry
from rlhf_core.testing.arithmetic_task import ArithmeticTask, verify
from rlhf_core.testing.tiny import save_tiny

TASK = ArithmeticTask("sums", terms=2, digits=1, wrong=0.5)
MOST_TOKENS = 14
"""A right answer has at most 12 tokens."""
OPTIONS = {
    "learning_rate": 5e-4, "warmup_ratio": 0.05, "optimizer": {"beta2": 0.99}, "max_length": 32, "dataset": {"wrap": "none"},
    "logging": {"progress": False},
}  # fmt: skip
METHODS = {
    "grpo": {"batch_size": 64, "group_size": 8, "minibatches": 2, "kl_weight": 0, "equal_groups": "skip"},
    "ppo": {"batch_size": 512, "rollout_epochs": 1, "minibatches": 2, "kl_weight": 0, "truncated": "score"},
}


def train(method: str, model: Path, output: Path, record: str, rows: int, rewards: Any = None, **options: Any) -> Path:
    """Train a model with a method on so many rows of the task; return the directory of the trained one."""
    trainer = registry.get("trainer", method)
    data = list(TASK.rows(record, rows, seed=1))
    run = trainer(trainer.Config.parse({**OPTIONS, **options}), model=model, data=data, output=output, rewards=rewards)
    return Path(run.train().model_dir)


def right(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(verify(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def answered(model: Path) -> tuple[list[float], list[float]]:
    """Return by problem the share of right answers among eight samples, and whether the greedy answer is right."""
    policy = PolicyModel.from_pretrained(model)
    prompts = list(dict.fromkeys(islice(TASK.problems(seed=2), 400)))[:100]
    sampled = policy.generate(prompts, n=8, max_new_tokens=MOST_TOKENS, seed=0)
    greedy = policy.generate(prompts, max_new_tokens=MOST_TOKENS, temperature=0)
    shares = [
        statistics.fmean(right([prompt] * 8, [one.text for one in group]))
        for prompt, group in zip(prompts, sampled, strict=True)
    ]
    return shares, [float(verify(prompt, only.text)) for prompt, (only,) in zip(prompts, greedy, strict=True)]


def standard_errors(before: list[float], after: list[float]) -> float:
    """Return by how many standard errors of the paired difference a mean rose."""
    risen = [new - old for old, new in zip(before, after, strict=True)]
    return statistics.fmean(risen) / (statistics.stdev(risen) / math.sqrt(len(risen)))


@pytest.fixture(scope="module")
def imitator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], list[float]]:
    """A model that has imitated solutions of which half are wrong, and how it answers."""
    folder = tmp_path_factory.mktemp("imitator")
    start = save_tiny(folder / "start", layers=2, hidden=64, heads=4, kv_heads=4, max_positions=32)
    options = {"learning_rate": 3e-3, "batch_size": 64, "max_steps": 250}
    model = train("sft", start, folder / "sft", "sft", 250 * 64, **options)
    return model, *answered(model)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_more_samples_are_right(method: str, imitator: tuple[Path, list[float], list[float]], tmp_path: Path) -> None:
    model, sampled, greedy = imitator
    options = {**METHODS[method], "max_steps": 40, "generation": {"max_new_tokens": MOST_TOKENS}}
    trained = train(method, model, tmp_path, "prompt", 20 * METHODS[method]["batch_size"], [right], **options)
    sampled_after, greedy_after = answered(trained)
    assert statistics.fmean(sampled_after) > statistics.fmean(sampled) + 0.05
    assert standard_errors(sampled, sampled_after) > 3
    assert statistics.fmean(greedy_after) > statistics.fmean(greedy) - 0.12
