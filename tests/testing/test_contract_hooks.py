"""The hooks' contract: a right one passes, and each kind of fault is caught by the check that is made for it."""

from __future__ import annotations

import random

import pytest
import torch
from planted_faults import assert_caught, contract_of

from rlhf_core.plugin import hookimpl
from rlhf_core.testing import HookContract
from rlhf_core.testing.runner import run_contract

HEARD: list[str] = []


class Listens:
    """Hears everything, and draws from a generator of its own."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    @hookimpl
    def run_started(self, run):
        HEARD.append("run_started")

    @hookimpl
    def step_ended(self, run, step, metrics):
        HEARD.append("step_ended")
        assert self.random.random() < 1 and metrics["loss"] < 100

    @hookimpl
    def rollouts_scored(self, samples, rewards):
        HEARD.append("rollouts_scored")
        assert len(samples) == len(rewards) and samples[0].completion_ids

    @hookimpl
    def evaluated(self, metrics):
        HEARD.append("evaluated")
        assert "eval_reward" in metrics

    @hookimpl
    def checkpoint_saved(self, path):
        HEARD.append("checkpoint_saved")
        assert path.is_dir()

    @hookimpl
    def run_ended(self, result):
        HEARD.append("run_ended")

    @hookimpl
    def run_failed(self, error):
        HEARD.append("run_failed")
        assert "this reward of the kit fails" in str(error)


class Deaf:
    def step_ended(self, step):
        """It lacks its mark."""


class Misspelt:
    @hookimpl
    def step_end(self, step):
        pass


class NeedsADirectory:
    @hookimpl
    def run_ended(self, run):
        (run.output / "done").touch()


class RaisesOnFailure:
    @hookimpl
    def run_failed(self, error):
        raise RuntimeError(error.errno)


class MovesWeights:
    @hookimpl
    def step_ended(self, run):
        with torch.no_grad():
            next(run.policy.parameters()).mul_(0.5)


@pytest.mark.parametrize(
    ("hook", "check", "reason"),
    [
        (
            Deaf,
            "test_it_handles_an_event",
            "the hook handles no event: mark a function with `@hookimpl`, named as one of run_started, step_ended",
        ),
        (Misspelt, "test_it_handles_an_event", "there is no event `step_end`; did you mean `step_ended`"),
        (NeedsADirectory, "test_no_event_raises", "TypeError in run_ended.* in a run without a directory"),
        (RaisesOnFailure, "test_no_event_raises", "AttributeError in run_failed"),
        (MovesWeights, "test_the_run_does_not_change", "a run with the hook ends with other weights"),
    ],
)
def test_a_fault_is_caught(hook: type, check: str, reason: str) -> None:
    assert_caught(contract_of(HookContract, hook), {check: reason})


def test_a_right_hook_hears_everything(capsys: pytest.CaptureFixture[str]) -> None:
    from rlhf_core import registry
    from rlhf_core.registry.hooks import EVENTS

    HEARD.clear()
    registry.register("hook", "listens", Listens)
    assert run_contract("hook", "listens") == 0
    assert "4 ok" in capsys.readouterr().out
    assert set(HEARD) == set(EVENTS)
