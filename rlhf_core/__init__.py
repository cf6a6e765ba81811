"""Post-training for language models in which every method is a plugin."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

API = 1
"""The version of the contracts in `interfaces`. A plugin states the one that it was written for as a literal: `api = 1`."""

# Public name → the module that defines it. Loaded on first use, so that `import rlhf_core` imports no torch.
_PUBLIC = {
    "Trainer": "interfaces",
    "RewardFn": "interfaces",
    "Sampler": "interfaces",
    "Merger": "interfaces",
    "Loss": "interfaces",
    "Sample": "interfaces",
    "Completion": "interfaces",
    "BaseConfig": "config",
    "TrainerConfig": "config",
    "LoraConfig": "config",
    "TrainingStage": "config",
    "get_7b_model_config": "presets",
    "get_70b_model_config": "presets",
    "RLHFError": "errors",
    "Batch": "batch",
    "SFTDataset": "data",
    "PreferenceDataset": "data",
    "KTODataset": "data",
    "GRPODataset": "data",
    "StreamingSFTDataset": "data",
    "StreamingPreferenceDataset": "data",
    "StreamingKTODataset": "data",
    "StreamingGRPODataset": "data",
    "PolicyModel": "models",
    "RewardModel": "models",
    "ProcessRewardModel": "models",
    "ValueModel": "models",
    "over_vocabulary": "models",
    "OptimizedAttention": "models",
    "apply_lora": "models",
    "compile_model": "models",
    "ModelMerger": "merging",
    "MergeConfig": "merging",
    "layer_wise_interpolation": "merging",
    "CheckpointManager": "training",
    "EarlyStopping": "training",
    "TrainingLogger": "training",
    "create_optimizer": "training",
    "DeviceManager": "infra",
    "setup_logging": "infra",
}

__all__ = ["API", *_PUBLIC, "__version__", "registry"]


def __getattr__(name: str) -> Any:
    if name == "registry":
        return importlib.import_module("rlhf_core.registry")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"rlhf_core.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'rlhf_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
