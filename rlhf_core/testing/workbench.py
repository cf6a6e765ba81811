"""A trainer set up as a run sets it up, to look at single windows and updates without a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Trainer, Window
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.seeds import RandomState, seed_everything
from rlhf_core.rewards import open_rewards
from rlhf_core.testing.scripted_engine import BenchContext, Script
from rlhf_core.training.context import RunContext
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.logger import without_timing
from rlhf_core.training.loss_scale import LossScale
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.optimizer import AnyOptimizer, set_learning_rate
from rlhf_core.training.reduction import quotients, sum_pairs
from rlhf_core.training.roles import set_training_mode
from rlhf_core.training.run_data import one_pass
from rlhf_core.training.setup import RunSetup

GARBAGE = 65
"""The token id that fills padding, where no method may look: an ordinary id of the tiny tokenizer."""


def run_context(
    trainer: Trainer[Any],
    *,
    distribution: Distribution | None = None,
    rewards: Sequence[Any] = (),
    evaluating: bool = False,
    step: int = 0,
) -> RunContext:
    """Return a run context in which to call a method's `experience` without a run; its `models` must be set.

    Args:
        trainer: the method.
        distribution: this process among those of `simulate`; a single process where None.
        rewards: what `Trainer(rewards=…)` accepts.
        evaluating: whether the method is to see an evaluation.
        step: optimiser steps made so far.
    """
    devices = DeviceManager()
    return RunContext(
        trainer,
        distribution or Distribution(devices.device),
        devices,
        MicroBatches(trainer.config, divide=trainer.splits_groups),
        open_rewards(rewards),
        clock=lambda: step,
        evaluating=evaluating,
    )


@dataclass(frozen=True)
class Step:
    """The loss, metrics and gradient of one update."""

    loss: float
    metrics: dict[str, float]
    gradient: dict[str, Tensor]
    """By parameter name, summed over micro-batches and before clipping; parameters without a gradient are left out."""


class NothingToLearn(AssertionError):
    """Raised for a window whose weights are all zero, for which the loop makes no optimiser step."""


class Workbench(RunSetup):
    """A trainer set up as for its first step, on which windows and updates are made one by one, outside of a run.

    Args:
        trainer: the method, with a configuration, a model and data.
        distribution: this process among those of `simulate`; a single process where None.
        script: completions for its engine to repeat; drawn as in a run where None.
    """

    def __init__(
        self, trainer: Trainer[Any], distribution: Distribution | None = None, script: Script | None = None
    ) -> None:
        devices = DeviceManager()
        super().__init__(trainer, distribution or Distribution(devices.device), devices)
        self.build_models()
        self.open_data()
        self.load_rewards()
        self.inspect_data()
        self.share_parameters()
        # Each simulated process scores every row for the reference by itself.
        self.precompute_reference(alone=True)
        shuffle = self.config.dataset.shuffle
        self.batches: Iterator[Batch] = one_pass(trainer, self.dataset, self.distribution, shuffle=shuffle)
        self.steps = 0
        """Optimiser steps made so far, as the run context reports them."""
        self.run = self.make_context(BenchContext, clock=lambda: self.steps, script=script)
        """The run context that the method's `experience` gets."""
        seed_everything(self.config.seed, "training", self.distribution.rank)

    @torch.no_grad()
    def perturb(self, scale: float = 0.02) -> None:
        """Add fixed Gaussian noise to every trained parameter: while policy and reference are equal, many gradients are zero."""
        for name, parameter in self.parameters.items():
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)

    def pad(self) -> None:
        """Widen the padding of every batch and micro-batch that the method sees, and fill all padding with a garbage token id."""
        self.batches = map(padded, self.batches)
        self.micro_batches = PaddedMicroBatches(self.trainer.config, divide=self.trainer.splits_groups)

    def windows(self) -> Iterator[Window]:
        """Yield the method's windows over one pass of the data, as the loop asks for them."""
        windows = iter(self.trainer.experience(self.batches, self.run))
        while True:
            set_training_mode(self.trainer, False)
            with torch.no_grad(), self.devices.autocast(self.trainer.config.precision):
                made = next(windows, None)
            set_training_mode(self.trainer, True)
            # A process that gathers more often than others meets them here, in another collective call, and is reported.
            self.distribution.barrier()
            if made is None:
                return
            yield made if isinstance(made, Window) else Window(made)

    def window(self) -> Batch:
        """Return the method's first window."""
        for window in self.windows():
            return window.batch
        raise AssertionError("`experience` yields no window from a pass over the data")

    def split_window(self, window: Batch) -> list[Batch]:
        """Return the window's micro-batches, on the device."""
        return [micro.to(self.devices.device) for micro in self.micro_batches.cut(window)]

    def step(self, window: Batch) -> Step:
        """Return the loss, metrics and gradient of the loop's update on a window, without changing parameters."""
        return self._recorded(window, None)

    def first(self) -> Step:
        """Return the update on the first window as in `step`, its metrics with those that `experience` reported by `run.log`."""
        window = self.window()
        logged = self.logged()
        found = self.step(window)
        return replace(found, metrics=without_timing(logged) | found.metrics)

    def logged(self) -> dict[str, float]:
        """Return the means of what the method reported by `run.log` since the last call, over all processes."""
        return quotients(sum_pairs(self.distribution, self.run.logged()))

    def train_step(self, window: Batch) -> Step:
        """Make the loop's update on a window, with an optimiser step, and return its loss, metrics and gradient."""
        optimizer = self.make_optimizer()
        set_learning_rate(optimizer, self.trainer.config.learning_rate)
        return self._recorded(window, optimizer)

    def _recorded(self, window: Batch, optimizer: AnyOptimizer | None) -> Step:
        """Return the loop's update on a window; parameters change only where an optimiser is given."""
        recorder = _Recorder(self.parameters, optimizer)
        result = self.make_updater(recorder, LossScale(enabled=False), lambda *_, **__: None)(window, 1)
        if result is None:
            raise NothingToLearn("every weight of the window is zero, so there is nothing to learn from its rows")
        return Step(result.loss, result.metrics, recorder.gradient)


class _Recorder(torch.optim.Optimizer):
    """An optimiser whose step records the gradient, and is passed on to another optimiser where there is one."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: AnyOptimizer | None) -> None:
        super().__init__(parameters.values(), {})
        self._named, self._optimizer = parameters, optimizer
        self.gradient: dict[str, Tensor] = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradient = {name: p.grad.detach().clone() for name, p in self._named.items() if p.grad is not None}
        if self._optimizer is not None:
            self._optimizer.step()


class PaddedMicroBatches(MicroBatches):
    """Micro-batches as the loop makes them, with wider padding."""

    def _cut(self, window: Batch, divide: bool) -> list[Batch]:
        return [padded(micro) for micro in super()._cut(window, divide)]


def padded(batch: Batch) -> Batch:
    """Return the batch with wider padding, all of it filled with a garbage token id."""
    batch = batch.pad(3, 5, value=GARBAGE)

    def filled(ids: Tensor, lengths: Tensor) -> Tensor:
        return torch.where(torch.arange(ids.shape[1], device=ids.device) < lengths[:, None], ids, GARBAGE)

    return replace(
        batch,
        prompt_ids=filled(batch.prompt_ids, batch.prompt_lengths),
        response_ids=filled(batch.response_ids, batch.response_lengths),
    )


def reseeds(action: Callable[[], object]) -> str | None:
    """Return the name of a global random generator (`random`, `numpy`, `torch`) that an action seeds, or None.

    Drawing numbers isn't seeding: the numbers that follow still depend on the state before.
    """
    before = RandomState.capture()
    draws = []
    try:
        for seed in (1, 2):
            seed_everything(seed, "reseeds")
            action()
            draws.append({"random": random.random(), "numpy": np.random.rand(), "torch": float(torch.rand(1))})
    finally:
        before.restore()
    return next((name for name in draws[0] if draws[0][name] == draws[1][name]), None)
