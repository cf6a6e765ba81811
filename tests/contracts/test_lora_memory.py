"""An online run with LoRA and a reference holds its base once: the tensors that are alive are counted."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from policy_gradient import PolicyGradientConfig, PolicyGradientTrainer

from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Workbench

WIDTH, LAYERS = 56, 3
"""A width that nothing else in the process has."""
UP = (3 * WIDTH, WIDTH)
"""The shape of each layer's feed-forward matrices, of which there are three, one of them transposed."""
BASE = 3 * LAYERS
"""How many such matrices a model has."""
ROWS = [{"prompt": f"{number}+{number}=?"} for number in range(4)]


def digits(completions: list[str]) -> list[float]:
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def matrices() -> int:
    """Return how many tensors of a feed-forward matrix's shape, or its transpose's, are alive, each memory once."""
    for _ in range(3):  # what the end of one object releases is found by the next pass
        gc.collect()
    alive = [
        one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and tuple(one.shape) in (UP, UP[::-1])
    ]
    return len({one.untyped_storage().data_ptr() for one in alive})


@pytest.mark.parametrize("reference", ["auto", "copy"])
def test_the_base_is_held_once(reference: str) -> None:
    """While the loss is computed and after a step; the reference is the base with the adapter off, or a copy of the adapter."""
    options = {
        "learning_rate": 1e-3, "kl_weight": 0.1, "reference": reference, "batch_size": 2, "group_size": 4, "lora": {"rank": 2},
        "generation": {"max_new_tokens": 6}, "max_length": 64, "logging": {"progress": False},
    }  # fmt: skip
    seen: list[int] = []

    class Watched(PolicyGradientTrainer):
        def loss(self, batch: Any) -> Any:
            found = super().loss(batch)
            seen.append(matrices())
            return found

    model = PolicyModel(tiny_model(hidden=WIDTH, heads=2, kv_heads=1, layers=LAYERS), tiny_tokenizer())
    trainer = Watched(PolicyGradientConfig.parse(options), model=model, data=ROWS, rewards=[digits])
    bench = Workbench(trainer)
    for _ in range(2):
        bench.train_step(bench.window())
        bench.steps += 1
    assert seen == [BASE, BASE] and matrices() == BASE
    assert list(trainer.models) == ["policy"] and trainer.reference.mode == (
        "adapter_off" if reference == "auto" else "copy"
    )


def test_training_every_weight_holds_a_reference_beside_it() -> None:
    """The count sees a copy."""
    options = {"kl_weight": 0.1, "batch_size": 2, "generation": {"max_new_tokens": 6}, "max_length": 64}
    model = PolicyModel(tiny_model(hidden=WIDTH, heads=2, kv_heads=1, layers=LAYERS), tiny_tokenizer())
    config = PolicyGradientConfig.parse({**options, "logging": {"progress": False}})
    bench = Workbench(PolicyGradientTrainer(config, model=model, data=ROWS, rewards=[digits]))
    assert matrices() == 2 * BASE and bench.trainer.reference.mode == "copy"
