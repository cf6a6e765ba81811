"""The run of a method: set-up, the loop of steps, updates and their reduction, evaluation, state and checkpoints, the record."""

from __future__ import annotations

from rlhf_core.infra.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.training.checkpoint": "CheckpointManager",
        "rlhf_core.training.early_stopping": "EarlyStopping",
        "rlhf_core.contracts.result": "TrainResult",
        "rlhf_core.training.logger": "TrainingLogger",
        "rlhf_core.training.optimizer": "create_optimizer",
    },
)
