"""Interpolation between two models, with a share for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.merge import MergeResult, ModelMerger

METHOD = "layer_wise"


def layer_wise_interpolation(
    base: str | Path,
    model: str | Path,
    t: float | Sequence[float] | Mapping[str, Any] = 0.5,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> MergeResult:
    """Write (1 - t)·base + t·model to a directory, with a t for each layer.

    Memory stays small however large the models are. It is `rlhf merge layer_wise` in one call:
    `layer_wise_interpolation("base", "tuned", [0.0, 1.0], output="between")` keeps the first layer of the base and takes the
    last of the tuned model.

    Args:
        base: directory, adapter or hub name of the model at t = 0, which gives configuration and tokenizer.
        model: the same of the model at t = 1.
        t: the model's share; larger is nearer the model, below 0 and above 1 extrapolates. One number; a list over the layers
            (its values at even distances from the first layer to the last, straight lines between); or per-layer values, as a
            group with `layers`, `gradient`, `filters` (`attention`, `mlp`, part of a tensor's name …) and `default`.
        output: the directory that is written.
        resume: continue a merge into the same output that was killed.
        overwrite: replace a model in the output.
        options: other keys of `MergeConfig`, such as `dtype` or `threads`.

    Raises:
        ConfigError: t is invalid, or has another number of layers than the models.
        ModelError: the models can't be read, or have different tensors.
        StorageError: the output holds a model already, or can't be written.
    """
    value = t if isinstance(t, int | float | Mapping) else list(t)
    config = MergeConfig.parse(
        {
            **options,
            "method": METHOD,
            "base": str(base),
            "models": [str(model)],
            "output": str(output),
            "options": {"t": value},
        },
        place="layer_wise_interpolation",
    )
    return ModelMerger(config).merge(resume=resume, overwrite=overwrite)
