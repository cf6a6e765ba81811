"""An online run with LoRA and a reference holds its base once: the tensors that are alive are counted."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from rlhf_core import registry
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Workbench

WIDTH, LAYERS = 56, 2
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
    alive = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return len({one.untyped_storage().data_ptr() for one in alive if tuple(one.shape) in (UP, UP[::-1])})


def bench_of(method: str, **options: Any) -> tuple[Workbench, list[int]]:
    """Return a workbench of a method with a reference, and the list that gets `matrices()` after each computed loss."""
    seen: list[int] = []
    cls: Any = registry.get("trainer", method)

    class Watched(cls):  # type: ignore[misc]
        def loss(self, batch: Any) -> Any:
            found = super().loss(batch)
            seen.append(matrices())
            return found

    values = {
        "learning_rate": 1e-3, "kl_weight": 0.1, "batch_size": 2, "group_size": 3, "max_length": 64,
        "generation": {"max_new_tokens": 4}, "logging": {"progress": False}, **options,
    }  # fmt: skip
    model = PolicyModel(tiny_model(hidden=WIDTH, heads=2, kv_heads=1, layers=LAYERS), tiny_tokenizer())
    return Workbench(Watched(cls.Config.parse(values), model=model, data=ROWS, rewards=[digits])), seen


@pytest.mark.parametrize(
    ("method", "options", "mode"),
    [
        ("grpo", {}, "adapter_off"),
        pytest.param("grpo", {"reference": "copy"}, "copy", marks=pytest.mark.slow),
        pytest.param("ppo", {"value": {"share_backbone": True}}, "adapter_off", marks=pytest.mark.slow),
    ],
    ids=["grpo", "grpo, adapter copied", "ppo on one backbone"],
)
def test_the_base_is_held_once(method: str, options: dict[str, Any], mode: str) -> None:
    """While the loss is computed and after a step; the reference is the base with the adapter off, or a copy of the adapter."""
    bench, seen = bench_of(method, lora={"rank": 2}, **options)
    bench.train_step(bench.window())
    assert bench.trainer.reference.mode == mode
    assert seen and set(seen) == {BASE} and matrices() == BASE


def test_without_lora_a_reference_is_a_second_model() -> None:
    """The count sees a copy."""
    bench, _ = bench_of("grpo")
    assert matrices() == 2 * BASE and bench.trainer.reference.mode == "copy"
