"""How many tokens a micro-batch has where the configuration leaves that open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import toy

from rlhf_core import registry
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.models import PolicyModel
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training import micro_batches
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.setup import RunSetup


def built(**options: Any) -> MicroBatches:
    """Return how an SFT run on a tiny model cuts its windows."""
    method = registry.get("trainer", "sft")
    rows = list(ArithmeticTask().rows("sft", 4, seed=0))
    trainer = method(method.Config(**options), model=PolicyModel(tiny_model(), tiny_tokenizer()), data=rows)
    devices = DeviceManager("cpu")
    setup = RunSetup(trainer, Distribution(devices.device), devices)
    setup.build_models()
    return setup.micro_batches


def window(prompts: int) -> Batch:
    """Prompts of 3 tokens with one response of 5 tokens each."""
    return Batch(
        prompt_ids=torch.ones(prompts, 3, dtype=torch.long), prompt_lengths=torch.full((prompts,), 3),
        response_ids=torch.ones(prompts, 5, dtype=torch.long), response_lengths=torch.full((prompts,), 5),
        owner=torch.arange(prompts), loss_mask=torch.ones(prompts, 5, dtype=torch.bool), rows=tuple(range(prompts)),
    )  # fmt: skip


def test_on_a_cpu_hidden_states_fit_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    width = tiny_model().config.hidden_size
    monkeypatch.setattr(micro_batches, "CACHED_NUMBERS", 17 * width)
    assert [micro.num_prompts for micro in built().cut(window(5))] == [2, 2, 1]  # 16 tokens of 17
    assert built(batching={"micro_batch_tokens": 24}).max_tokens == 24
    assert built(batching={"micro_batch_tokens": None}).max_tokens is None


def test_on_other_devices_and_for_models_of_unknown_width_nothing_bounds_them() -> None:
    for device, width in ((torch.device("cuda"), 64), (torch.device("cpu"), None)):
        found = MicroBatches(toy().config)
        found.fit(device, width)
        assert [micro.num_prompts for micro in found.cut(window(5))] == [5]


def test_a_wide_model_has_one_row_at_least() -> None:
    found = MicroBatches(toy().config)
    found.fit(torch.device("cpu"), 2**30)
    assert [micro.num_prompts for micro in found.cut(window(2))] == [1, 1]
