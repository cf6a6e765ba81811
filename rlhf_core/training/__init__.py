"""The one training loop, and what it stands on: reduction, optimiser, checkpoints, evaluation, the run directory."""

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
        "rlhf_core.training.loop": "run",
    },
)
