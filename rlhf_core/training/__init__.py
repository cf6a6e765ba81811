"""The one training loop, and what it stands on: reduction, optimiser, checkpoints, evaluation, the run directory."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "CheckpointManager": "checkpoint",
    "EarlyStopping": "early_stopping",
    "TrainResult": "result",
    "TrainingLogger": "logger",
    "create_optimizer": "optimizer",
    "run": "loop",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"rlhf_core.training.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'rlhf_core.training' has no attribute {name!r}")
