"""Training on groups of completions: how many tokens are forwarded, for whole groups and cut ones; the update is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batches import relative
from rlhf_plugins.trainers.distill import DistillationConfig, DistillationTrainer
from torch import nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.models import PolicyModel
from rlhf_core.testing.scripted_engine import Script
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Workbench

GROUP = 6
ROWS = [{"prompt": "9*8+7*6+5*4+3*2=?" * (1 + number)} for number in range(3)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher"), seed=9, hidden=32, heads=2, kv_heads=1)


def bench_on_groups(teacher: Path, script: Script, **options: Any) -> Workbench:
    """Return a workbench of a method that trains on groups of its own completions."""
    config = DistillationConfig.parse(
        {
            "teacher": str(teacher), "on_policy": 1, "prompts_only": True, "group_size": GROUP, "batch_size": 3,
            "generation": {"max_new_tokens": 8}, "max_length": 256, "logging": {"progress": False}, **options,
        }
    )  # fmt: skip
    model = PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())
    return Workbench(DistillationTrainer(config, model=model, data=ROWS), script=script)


class Counter:
    """Counts the tokens that a model's blocks compute, padding included."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
        assert isinstance(layers, nn.ModuleList)
        layers[0].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, positional: Any, named: Any) -> None:
        states = positional[0] if positional else named["hidden_states"]
        self.tokens += states.shape[0] * states.shape[1]


def expected_tokens(micro_batches: list[Batch], *, share: bool = True) -> int:
    """Return the tokens of each response without its last one, and of its prompt once per micro-batch, or once per response."""
    total = 0
    for micro in micro_batches:
        copies = micro.prompt_lengths if share else micro.prompt_lengths[micro.owner]
        total += int(copies.sum()) + int(micro.response_lengths.sum()) - micro.num_responses
    return total


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, True),
        ({"micro_batch_size": 4}, True),
        ({"batching": {"micro_batch_tokens": 60}}, True),
        ({"batching": {"share_prompts": False}}, False),
    ],
    ids=["whole", "cut", "cut by tokens", "apart"],
)
def test_a_prompt_is_computed_once_per_micro_batch(options: dict[str, Any], share: bool, teacher: Path) -> None:
    """By the student, forward and backward, and by its teacher; the update is that of whole groups on the same completions."""
    script = Script()
    whole = bench_on_groups(teacher, script)
    expected = whole.step(whole.window())
    bench = bench_on_groups(teacher, script, **options)
    window = bench.window()
    assert window.num_responses == 3 * GROUP and window.num_prompts == 3
    bench.step(window)  # the models are probed, once
    counters = [Counter(bench.trainer.models[role]) for role in ("policy", "teacher")]
    found = bench.step(window)
    micro_batches = bench.run.micro_batches.cut(window)
    assert (len(micro_batches) > 1) == ("micro_batch" in str(options))
    assert [counter.tokens for counter in counters] == [expected_tokens(micro_batches, share=share)] * 2
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, value in expected.gradient.items():
        assert relative(found.gradient[name], value) < 1e-4, name


def test_cut_groups_stay_together_where_they_can(teacher: Path) -> None:
    """A group is in no more micro-batches than its size and the place where it begins in one need."""
    bench = bench_on_groups(teacher, Script(), micro_batch_size=4)
    micro_batches = bench.run.micro_batches.cut(bench.window())
    assert [micro.num_responses for micro in micro_batches] == [4, 4, 4, 4, 2]
    assert [micro.num_prompts for micro in micro_batches] == [1, 2, 1, 1, 1]
