"""GRPO and its family: the contract, each row against its paper, options, and runs that learn."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from rlhf_plugins import GRPOTrainer

from rlhf_core.testing import TrainerContract

OPTIONS: dict[str, Any] = {
    "generation": {"max_new_tokens": 8}, "rollout_epochs": 2, "minibatches": 2, "group_size": 4,
    "rewards": ["online_helpers:digits"],
}  # fmt: skip


class TestContract(TrainerContract):
    trainer = GRPOTrainer
    options: ClassVar[dict[str, Any]] = OPTIONS


@pytest.mark.slow
class TestContractOfDAPO(TrainerContract):
    trainer = GRPOTrainer
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "variant": "dapo"}


@pytest.mark.slow
class TestContractOfReinforcePlusPlus(TrainerContract):
    trainer = GRPOTrainer
    options: ClassVar[dict[str, Any]] = {
        **OPTIONS, "variant": "reinforce_plus_plus", "correction": "token_truncated", "equal_groups": "skip",
    }  # fmt: skip


@pytest.mark.slow
class TestContractOfGMPO(TrainerContract):
    trainer = GRPOTrainer
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "variant": "gmpo", "kl_weight": 0.05, "kl_importance": True}
