"""Two steps of a method on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_core import registry


def short_run(method: str, model: Any, data: Any, output: Path, **options: Any) -> Any:
    """Train a model for two steps of four rows with a method found by name; return the trainer."""
    cls = registry.get("trainer", method)
    config = cls.Config(
        **{"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "logging": {"progress": False}} | options
    )
    trainer = cls(config, model=model, data=data, output=output)
    trainer.train()
    return trainer
