"""Trainers with their models built, and comparisons of a loss with an oracle's, for the tests of methods that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
from batches import relative
from torch import Tensor

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.setup import RunSetup

TrainerT = TypeVar("TrainerT", bound=Trainer)  # type: ignore[type-arg]


ROWS_OF_RECORDS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "1+1=", "response": "2"},
    "preference": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    "unpaired": {"prompt": "1+1=", "response": "2", "label": True},
    "prompt": {"prompt": "1+1="},
    "reasoning": {"prompt": "1+1=", "answer": "2", "verifiable": True},
}
"""A row of each record type."""


def small_policy() -> PolicyModel:
    """Return a random policy, always the same one."""
    return PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())


@torch.no_grad()
def move(policy: PolicyModel, seed: int = 1) -> None:
    """Add noise to every weight, so that the policy isn't its reference."""
    for parameter in policy.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))


def built(cls: type[TrainerT], *, model: Any = None, **options: Any) -> TrainerT:
    """Return a trainer whose models are built as a run builds them, of one row and without a run."""
    config = cls.Config.parse(options)
    row = ROWS_OF_RECORDS[cls.record_type(config)]
    trainer = cls(config, model=model if model is not None else small_policy(), data=[row])
    devices = DeviceManager()
    RunSetup(trainer, Distribution(devices.device), devices).build_models()
    return trainer


def assert_refused(config: type[BaseConfig], options: dict[str, Any], message: str) -> None:
    """Fail unless a configuration refuses these options with this message and the exit code of wrong options."""
    with pytest.raises(ConfigError) as caught:
        config.parse(options)
    assert message in str(caught.value) and caught.value.exit_code == 2


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a sum by several tensors of one shape, stacked, float64."""
    return torch.stack(torch.autograd.grad(value.sum(), inputs, retain_graph=True)).double()


def assert_same(found: Tensor, expected: Tensor, inputs: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    """Fail unless losses and their gradients by the inputs are equal, ‖difference‖ / ‖expected‖ below the tolerance."""
    assert relative(found.double(), expected.double()) < tolerance
    assert relative(gradients(found, inputs), gradients(expected, inputs)) < tolerance


class TrlMetrics(dict[str, list[float]]):
    """What TRL's trainers append their metrics to: a list for any name."""

    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])
