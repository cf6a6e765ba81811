"""A model between two others, as far along as each layer says."""

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
    **settings: Any,
) -> MergeResult:
    """Write the model that lies between two others, (1 - t)·base + t·model, with a t for each layer.

    Tensors stream past, so memory stays small however large the models are. It is `rlhf merge layer_wise` in one call:
    `layer_wise_interpolation("base", "tuned", [0.0, 1.0], output="between")` keeps the first layer of the base and takes the
    last of the tuned model.

    Args:
        base: directory, adapter or hub name of the model at t = 0; configuration and tokenizer are its.
        model: that of the model at t = 1.
        t: where between the two the result lies; larger is nearer the model. One number; a list over the layers, its values at
            even distances from the first layer to the last and straight lines between; or values by place, as a group with
            `layers`, `gradient`, `filters` (`attention`, `mlp`, part of a name …) and `default`. Below 0 and above 1 it
            extrapolates.
        output: the directory that is written.
        resume: go on with a merge into the same output that was killed.
        overwrite: replace a model in the output.
        settings: other keys of `MergeConfig`, such as `dtype` or `threads`.

    Raises:
        ConfigError: t can't do, or has another number of layers than the models.
        ModelError: the models don't fit together.
    """
    value = t if isinstance(t, int | float | Mapping) else list(t)
    config = MergeConfig.parse(
        {
            **settings,
            "method": METHOD,
            "base": str(base),
            "models": [str(model)],
            "output": str(output),
            "options": {"t": value},
        },
        place="layer_wise_interpolation",
    )
    return ModelMerger(config).merge(resume=resume, overwrite=overwrite)
