"""What a training run returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainResult:
    """The end of a run."""

    step: int
    """Optimiser steps taken, those before a resume included."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last step's row of metrics."""
    eval_metrics: dict[str, float] = field(default_factory=dict)
    """The evaluation of the model that is exported, names prefixed `eval_`: the last one, or the best one where that is kept."""
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
    stopped_because: str | None = None
    """Why it was ended early: the metric, its best value and the patience, or the KL and its budget; None where it wasn't."""
    best_step: int | None = None
    """The step at which the metric of `keep_best`, else of early stopping, was best; None without either."""
    best_metric: str | None = None
    """The name of that metric."""
    best_value: float | None = None
    """Its value at `best_step`; None where it was never finite."""
    model_step: int | None = None
    """The step whose weights `model_dir` holds and the trainer's models have."""
    pushed: str | None = None
    """The address on the hub that `model_dir` was uploaded to; None where it wasn't."""
    push_error: str | None = None
    """Why the upload failed that `push_to_hub` asked for; the run itself is whole."""
    status: Literal["done"] = "done"
    """A run that ends otherwise raises an error."""
