"""Starting points for common model sizes, as plain options that a file or flag overrides."""

from __future__ import annotations

import copy
from typing import Any

from rlhf_core.infra.errors import ConfigError, did_you_mean

_SHARED: dict[str, Any] = {
    "precision": "bf16",
    "gradient_checkpointing": True,
    "lr_schedule": "cosine",
    "warmup_ratio": 0.03,
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


def get_7b_model_config(**changes: Any) -> dict[str, Any]:
    """Return options for a model of about 7 B parameters: `DPOConfig(**get_7b_model_config(beta=0.2))`."""
    return {**get_preset("7b"), **changes}


def get_70b_model_config(**changes: Any) -> dict[str, Any]:
    """Return options for a model of about 70 B parameters, its frozen base in 4 bits."""
    return {**get_preset("70b"), **changes}
