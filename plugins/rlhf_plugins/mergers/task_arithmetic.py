"""Task arithmetic: weighted sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from rlhf_core.plugin import BaseConfig, Chunk, Merger


def task_arithmetic(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    """Return θ₀ + λ Σ wᵢ δᵢ, in place of the base.

    Ilharco et al. 2023, Editing models with task arithmetic (arXiv 2212.04089), section 2: λ scales the sum of the task vectors
    δᵢ = θᵢ - θ₀. Deviation: weights wᵢ, not normalised.

    Args:
        base: θ₀, (N,) float32; overwritten.
        deltas: δᵢ, each (N,) float32.
        weights: wᵢ; a negative one unlearns a task.
        scale: λ.
    """
    for delta, weight in zip(deltas, weights, strict=True):
        base.add_(delta, alpha=weight * scale)
    return base


class TaskArithmeticConfig(BaseConfig):
    """Options of task arithmetic."""

    scale: float = Field(1.0, description="Factor λ of the summed task vectors; larger moves farther from the base.")


class TaskArithmeticMerger(Merger):
    """Weighted sum of task vectors, added to the base (Ilharco et al. 2023)."""

    api = 1
    commutative = True
    Config = TaskArithmeticConfig
    config: TaskArithmeticConfig
    needs_base = True
    neutral: ClassVar = {"scale": 1.0}

    def merge_chunk(self, chunk: Chunk, measured: None) -> Tensor:
        return task_arithmetic(chunk.origin, chunk.deltas(), chunk.weights, self.config.scale)
