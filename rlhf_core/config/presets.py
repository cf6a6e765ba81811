"""Starting points for common model sizes, as plain options that a file or flag overrides."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from rlhf_core.config.training import LORA_RATE_FACTOR, TrainerConfig
from rlhf_core.infra.errors import ConfigError, did_you_mean

_SHARED: dict[str, Any] = {
    "precision": "bf16",
    "gradient_checkpointing": True,
    "lr_schedule": "cosine",
    "max_grad_norm": 1.0,
    "max_length": 2048,
    "checkpoint": {"every": 200, "keep": 2},
}

PRESETS: dict[str, dict[str, Any]] = {
    "7b": {**_SHARED, "batch_size": 64, "batching": {"micro_batch_tokens": 16384}, "lora": {"rank": 16, "alpha": 32.0}},
    "70b": {
        **_SHARED,
        "batch_size": 128,
        "batching": {"micro_batch_tokens": 4096},
        "lora": {"rank": 32, "alpha": 64.0, "quantize": "4bit"},
    },
}


ABOUT: dict[str, str] = {
    "7b": "LoRA on one device of 80 GB: the frozen base takes 14 GB in bf16, and the reference no copy of it",
    "70b": "LoRA on a quantised base on one device of 80 GB: the base takes 35 GB in 4 bits, which leaves room for activations",
}
"""What each preset is for, and how much memory its weights take."""


def get_preset(name: str) -> dict[str, Any]:
    """Return a preset's options by name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset `{name}`", place="preset", fix=did_you_mean(name, PRESETS))
    return copy.deepcopy(PRESETS[name])


def with_rate_of_adapters(options: Mapping[str, Any], config: type[TrainerConfig]) -> dict[str, Any]:
    """Return a preset's options with a learning rate for its adapters, unless they have one or train no adapters.

    A method's default rate is one for every weight; adapters take `LORA_RATE_FACTOR` times as much.

    Args:
        config: of the method that the options are for.
    """
    fields = config.model_fields
    for_adapters = fields["lora"].default is not None
    if options.get("learning_rate") is not None or not options.get("lora") or for_adapters:
        return dict(options)
    return {**options, "learning_rate": float(f"{LORA_RATE_FACTOR * fields['learning_rate'].default:.6g}")}


def get_7b_model_config(config: type[TrainerConfig] | None = None, /, **changes: Any) -> dict[str, Any]:
    """Return options for a model of about 7 B parameters: `DPOConfig(**get_7b_model_config(DPOConfig, beta=0.2))`.

    Args:
        config: of the method, for a learning rate that fits its adapters; without it there is none among the options.
        changes: options in place of the preset's.
    """
    return _changed("7b", config, changes)


def get_70b_model_config(config: type[TrainerConfig] | None = None, /, **changes: Any) -> dict[str, Any]:
    """Return options for a model of about 70 B parameters, its frozen base in 4 bits; as `get_7b_model_config`."""
    return _changed("70b", config, changes)


def _changed(name: str, config: type[TrainerConfig] | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    options = {**get_preset(name), **changes}
    return options if config is None else with_rate_of_adapters(options, config)
