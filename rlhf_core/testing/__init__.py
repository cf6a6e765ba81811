"""For method authors: a contract to inherit for each kind of plugin, a tiny model, and a task that it can learn.

from rlhf_core.testing import TrainerContract

class TestMargin(TrainerContract):
    method = "acme-margin"
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_core.testing import arithmetic as arithmetic
    from rlhf_core.testing.merger_contract import MergerContract as MergerContract
    from rlhf_core.testing.processes import simulate as simulate
    from rlhf_core.testing.reward_contract import RewardContract as RewardContract
    from rlhf_core.testing.sampler_contract import SamplerContract as SamplerContract
    from rlhf_core.testing.tiny import save_tiny as save_tiny
    from rlhf_core.testing.tiny import tiny_model as tiny_model
    from rlhf_core.testing.tiny import tiny_policy as tiny_policy
    from rlhf_core.testing.tiny import tiny_tokenizer as tiny_tokenizer
    from rlhf_core.testing.trainer_contract import TrainerContract as TrainerContract
    from rlhf_core.testing.workbench import run_context as run_context

# Public name → the module that defines it, loaded on first use: the task alone needs no torch, and nothing needs pytest.
_PUBLIC = {
    "TrainerContract": "trainer_contract",
    "run_context": "workbench",
    "simulate": "processes",
    "RewardContract": "reward_contract",
    "SamplerContract": "sampler_contract",
    "MergerContract": "merger_contract",
    "tiny_model": "tiny",
    "tiny_policy": "tiny",
    "tiny_tokenizer": "tiny",
    "save_tiny": "tiny",
}

__all__ = [*_PUBLIC, "arithmetic"]


def __getattr__(name: str) -> Any:
    if name == "arithmetic":
        return importlib.import_module("rlhf_core.testing.arithmetic")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"rlhf_core.testing.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'rlhf_core.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
