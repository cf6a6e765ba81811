"""Runs of two steps on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_core import registry

ROWS = [{"prompt": f"{n} and {n}: ", "response": f"{2 * n}"} for n in range(8)]


def train(model: Path, output: Path, **options: Any) -> Any:
    """Train for two steps by SFT; return the result."""
    cls = registry.get("trainer", "sft")
    config = cls.Config(
        **{"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "logging": {"progress": False}} | options
    )
    return cls(config, model=str(model), data=ROWS, eval_data=ROWS[:2], output=output).train()
