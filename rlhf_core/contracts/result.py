"""What a training run returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """The end of a run."""

    step: int
    """Optimiser steps taken, those before a resume included."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last step's row of metrics."""
    eval_metrics: dict[str, float] = field(default_factory=dict)
    """The evaluation of the model that is exported, names prefixed `eval_`: the last one, or with early stopping the best one."""
    output: Path | None = None
    """The run directory."""
    model_dir: Path | None = None
    """The trained model as a Hugging Face directory."""
    seconds: float = 0.0
    """Time spent in steps, those before a resume included."""
    tokens: int = 0
    """Real tokens trained on, each prompt counted once."""
    stopped_early: bool = False
    """Whether early stopping or the KL budget ended the run."""
    best_step: int | None = None
    """The step at which early stopping's metric was best; None without it."""
    model_step: int | None = None
    """The step whose weights `model_dir` holds and the trainer's models have."""
    status: str = "done"
