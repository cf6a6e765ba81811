"""The conformance kit for plugin authors: a contract to inherit for each kind of plugin, a tiny model, and a task that it learns.

from rlhf_core.testing import TrainerContract

class TestMargin(TrainerContract):
    method = "acme-margin"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.infra.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_core.testing import arithmetic_task as arithmetic_task
    from rlhf_core.testing.hook_contract import HookContract as HookContract
    from rlhf_core.testing.merger_contract import MergerContract as MergerContract
    from rlhf_core.testing.reward_contract import RewardContract as RewardContract
    from rlhf_core.testing.sampler_contract import SamplerContract as SamplerContract
    from rlhf_core.testing.simulated_processes import simulate as simulate
    from rlhf_core.testing.tiny import save_tiny as save_tiny
    from rlhf_core.testing.tiny import tiny_model as tiny_model
    from rlhf_core.testing.tiny import tiny_policy as tiny_policy
    from rlhf_core.testing.tiny import tiny_tokenizer as tiny_tokenizer
    from rlhf_core.testing.trainer_contract import TrainerContract as TrainerContract
    from rlhf_core.testing.workbench import run_context as run_context

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.testing.trainer_contract": "TrainerContract",
        "rlhf_core.testing.workbench": "run_context",
        "rlhf_core.testing.simulated_processes": "simulate",
        "rlhf_core.testing.reward_contract": "RewardContract",
        "rlhf_core.testing.sampler_contract": "SamplerContract",
        "rlhf_core.testing.merger_contract": "MergerContract",
        "rlhf_core.testing.hook_contract": "HookContract",
        "rlhf_core.testing.tiny": "tiny_model tiny_policy tiny_tokenizer save_tiny",
        "rlhf_core.testing.arithmetic_task": "",
    },
)
