"""A rollout is cut into optimiser steps in the same way by any number of processes, and in another way in each pass."""

from __future__ import annotations

import pytest
import torch
from batches import random_batch
from toy import ToyTrainer, toy

from rlhf_core.config.online import OnlineConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import PluginError
from rlhf_core.testing import run_context, simulate
from rlhf_core.training.distribution import Distribution


def rollout(prompts: int) -> Batch:
    batch = random_batch(prompts, 2)
    return batch.attach(per_prompt={"row": torch.tensor(batch.rows)})


def parts_of(batch: Batch, count: int, *, step: int = 0, distribution: Distribution | None = None) -> list[Batch]:
    return run_context(toy(), step=step, distribution=distribution).minibatches(batch, count)


@pytest.mark.parametrize(("prompts", "count", "sizes"), [(8, 2, [4, 4]), (7, 3, [3, 2, 2]), (2, 4, [1, 0, 1, 0])])
def test_every_prompt_is_in_one_part_with_its_responses(prompts: int, count: int, sizes: list[int]) -> None:
    parts = parts_of(rollout(prompts), count)
    assert [part.num_prompts for part in parts] == sizes
    assert [part.num_responses for part in parts] == [2 * size for size in sizes]
    assert sorted(row for part in parts for row in part.rows) == sorted(rollout(prompts).rows)
    assert all(part["row"].tolist() == list(part.rows) for part in parts)


def test_another_step_draws_other_parts() -> None:
    first, again, later = ([part.rows for part in parts_of(rollout(8), 2, step=step)] for step in (0, 0, 4))
    assert first == again != later


@pytest.mark.parametrize("shares", [([0, 1, 2, 3], [4, 5, 6, 7]), ([5], [7, 0, 6, 1, 2, 4, 3]), ([], [*range(8)])])
def test_processes_cut_as_one_does(shares: tuple[list[int], list[int]]) -> None:
    whole = rollout(8)
    alone = [set(part.rows) for part in parts_of(whole, 3)]
    found = simulate(2, lambda d: [set(p.rows) for p in parts_of(whole.select(shares[d.rank]), 3, distribution=d)])
    assert [a | b for a, b in zip(*found, strict=True)] == alone


class OnlineToy(ToyTrainer):
    """The toy method with the options of an online one."""

    api = 1
    record = "sft"
    Config = OnlineConfig


def test_a_rollout_has_a_window_per_minibatch_of_each_epoch() -> None:
    config = OnlineConfig(rollout_epochs=2, minibatches=3)
    trainer = OnlineToy(config, model="unused", data=[])  # type: ignore[arg-type]
    run = run_context(trainer)
    windows = list(run.windows(rollout(7)))
    assert len(windows) == trainer.windows_per_batch() == 6
    assert [window.last for window in windows] == [False] * 5 + [True]
    for epoch in (windows[:3], windows[3:]):
        assert sorted(row for window in epoch for row in window.batch.rows) == sorted(rollout(7).rows)
    expected = [part.rows for part in run.minibatches(rollout(7), 3)]
    assert [window.batch.rows for window in windows[:3]] == expected


def test_a_method_without_rollouts_has_no_windows_of_one() -> None:
    assert toy().windows_per_batch() == 1
    with pytest.raises(PluginError, match=r"ToyTrainer\.experience: only a rollout of an online method"):
        next(iter(run_context(toy()).windows(rollout(2))))
