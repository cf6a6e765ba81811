"""A run of an online method that is made longer equals one that was planned so, also where it had ended inside a rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from online_helpers import digits, prompts
from rlhf_plugins import GRPOConfig, GRPOTrainer
from trainers_helpers import small_policy

from rlhf_core.infra.files import read_json
from rlhf_core.testing.interrupted_runs import metrics_of
from rlhf_core.training.checkpoint import CheckpointManager


def grpo(output: Path, steps: int) -> GRPOTrainer:
    """Four steps of each rollout."""
    options: dict[str, Any] = {
        "max_steps": steps, "lr_schedule": "constant", "warmup_ratio": 0, "learning_rate": 1e-2, "batch_size": 4,
        "generation": {"max_new_tokens": 4}, "rollout_epochs": 2, "minibatches": 2, "group_size": 4,
    }  # fmt: skip
    return GRPOTrainer(
        GRPOConfig.parse(options), model=small_policy(), data=prompts(count=8), rewards=[digits], output=output
    )


@pytest.mark.parametrize("ended", [4, 6], ids=["at a rollout's end", "inside a rollout"])
def test_a_stretched_run_draws_and_learns_what_the_planned_one_does(tmp_path: Path, ended: int) -> None:
    grpo(tmp_path / "stretched", ended).train()
    assert CheckpointManager(tmp_path / "stretched/checkpoints").steps() == [4, 6][: ended // 2 - 1]
    assert grpo(tmp_path / "stretched", 9).train(resume=True).step == 9
    grpo(tmp_path / "planned", 9).train()
    assert metrics_of(tmp_path / "stretched") == metrics_of(tmp_path / "planned")
    for name in ("model/model.safetensors", "checkpoints/step-9/optimizer.safetensors", "rollouts.jsonl"):
        assert (tmp_path / "stretched" / name).read_bytes() == (tmp_path / "planned" / name).read_bytes(), name
    assert read_json(tmp_path / "stretched/run.json")["changes"] == [
        {"step": 4, "options": {"max_steps": {"before": ended, "now": 9}}}
    ]
