"""Numbers that an engine can't work with are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.testing.tiny import tiny_policy


@pytest.mark.parametrize(
    "call, place",
    [
        (lambda engine, batch: engine.generate(batch, 1, seeds=[[-1]]), "generate(seeds=…)"),
        (lambda engine, batch: engine.generate(batch, 1, seeds=[[0.5]]), "generate(seeds=…)"),
        (lambda engine, batch: engine.extend(engine.prefill([[5]]), seeds=[-1]), "extend(seeds=…)"),
        (lambda engine, batch: engine.prefill([[5], [-1, 5]]), "prompts[1]"),
        (lambda engine, batch: engine.prefill([[10**6]]), "prompts[0]"),
    ],
)
def test_numbers_out_of_range(call: Any, place: str) -> None:
    policy = tiny_policy()
    with pytest.raises(ConfigError) as caught:
        call(Engine(policy), prompt_batch(policy, ["a"]))
    assert caught.value.place == place
