"""The run context: all that a method may ask of the core while it makes experience or evaluates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.trainer import Evaluation, Trainer
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import PluginError
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.batch_values import Axis, Values, batch_values
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.rewards import Rewards, Scores, samples_of
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.reduction import Tally


@dataclass
class RunContext:
    """What a method sees of the run it is in: no process, no device, no bound on memory."""

    trainer: Trainer[Any]
    distribution: Distribution
    devices: DeviceManager
    micro_batches: MicroBatches
    rewards: Rewards
    clock: Callable[[], int] = lambda: 0
    """Optimiser steps made so far."""
    notify: Callable[..., None] = lambda event, **values: None
    keep: Callable[..., None] = lambda samples, scores, **values: None
    """Keeps some of the samples that were scored, to be looked at."""
    evaluating: bool = False
    """Whether these are held-out rows, to be scored and not trained on."""
    _tally: Tally = field(default_factory=Tally, init=False)
    _engine: Engine | None = field(default=None, init=False)
    _begun: int | None = field(default=None, init=False)
    """The step that the engine draws for."""

    @property
    def step(self) -> int:
        """Optimiser steps that the models have made."""
        return self.clock()

    @property
    def engine(self) -> Engine:
        """Generates with the policy as it is now: the same modules and weights that train.

        Its draws are functions of the run's seed, the step and the row, so a resumed run draws what it would have drawn, and any
        number of processes draws the same.
        """
        policy = dict(self.trainer.models.items()).get("policy")
        if not isinstance(policy, PolicyModel):
            raise PluginError("there is no policy to generate with", place=f"{type(self.trainer).__name__}.experience")
        if self._engine is None:
            self._engine = Engine(policy, seed=self.trainer.config.seed)
        if self._begun != self.step:
            # Every evaluation draws alike, so that two of them are compared on the same draws.
            stream = ("evaluation",) if self.evaluating else ("rollout", self.step)
            self._engine.begin(*stream, policy_version=self.step)
            self._begun = self.step
        return self._engine

    def forward(
        self, batch: Batch, function: Callable[[Batch], Values], axis: Axis | tuple[Axis, ...] = "response"
    ) -> Values:
        """Return a function's values of a batch without gradients, forwarded in micro-batches that fit in memory.

        Args:
            batch: P prompts with R responses of at most T tokens.
            function: returns for a micro-batch one value per prompt, response or token, or a tuple of tensors of such; it
                must take a batch without rows.
            axis: `prompt`, `response` or `token`: what the values belong to. Where tensors of a tuple belong to different axes,
                a tuple of each one's: `("token", "response")`.

        Returns:
            (P, ...), (R, ...) or (R, T, ...), on the batch's device.
        """
        whole = "prompt" in (axis if isinstance(axis, tuple) else (axis,))
        cut = self.micro_batches.cut_between_prompts if whole else self.micro_batches.cut
        return batch_values(batch, function, axis=axis, cut=cut, device=self.devices.device)

    def gather(self, value: Any) -> Any:
        """Return a value of the whole step: every process's tensor or list joined into one, of numbers the list of all.

        Every process must call it as often as the others: once a window, not once a row. The order is that of processes, the
        same in each.
        """
        if isinstance(value, Tensor):
            whole = torch.cat(self.distribution.gather_tensor(value if value.ndim else value[None]))
            return whole.to(value.device)
        parts = self.distribution.gather(value)
        return [entry for part in parts for entry in part] if isinstance(value, list) else parts

    def over_step(self, function: Callable[..., Tensor], *values: Tensor, rows: Sequence[int]) -> Tensor:
        """Return this process's part of a function of the whole step's rows, such as ranks or whitened scores.

        Args:
            function: called with `values`, each joined over the processes in the order of `rows`; returns a tensor of as
                many rows.
            values: (n, ...), one entry for each of `rows`.
            rows: the row number of each entry, by which the order is the same for any number of processes.
        """
        numbers = torch.tensor(list(rows), dtype=torch.long)
        shares = [len(part) for part in self.distribution.gather_tensor(numbers)]
        order = self.gather(numbers).argsort(stable=True)
        found = function(*(self.gather(value)[order.to(value.device)] for value in values))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        first = sum(shares[: self.distribution.rank])
        return found[back.to(found.device)][first : first + len(numbers)]

    def minibatches(self, batch: Batch, count: int) -> list[Batch]:
        """Return this process's parts of a rollout's prompts, drawn at random, each for an optimiser step of its own.

        Over all processes a part holds the same prompts for any number of processes; here it may be empty. Draws are functions of
        the run's seed and the step, so each pass over a rollout cuts it in another way. Every process must call it as often as
        the others.

        Args:
            count: how many parts; those of a step with fewer prompts than that are empty everywhere.
        """
        generator = torch.Generator().manual_seed(stream_seed(self.trainer.config.seed, "minibatches", self.step))

        def parts(numbers: Tensor) -> Tensor:
            drawn = torch.randperm(len(numbers), generator=generator)
            return torch.arange(len(numbers))[drawn.argsort()] * count // max(len(numbers), 1)

        rows = batch.places or batch.rows
        part = self.over_step(parts, torch.tensor(rows, dtype=torch.long), rows=rows)
        return [batch.select((part == number).nonzero().flatten()) for number in range(count)]

    def score(self, batch: Batch, completions: Sequence[Sequence[Completion]]) -> Scores:
        """Return the configured rewards of completions, P lists in the order of the batch's prompts.

        While training, each reward's mean is reported as `reward/NAME` and the weighted sum's as `reward`; in an evaluation the
        method returns `Scores.per_prompt` as metrics, which have standard errors. Listeners hear of `rollouts_scored`.

        Raises:
            PluginError: a reward raises, takes too long, or returns another number of scores, None, or what isn't finite.
        """
        samples = samples_of(batch, completions)
        rows = [row for row, drawn in zip(batch.rows, completions, strict=True) for _ in drawn]
        scores = self.rewards.score(samples, rows=rows)
        if not self.evaluating:
            for name, values in scores.by_name.items():
                self.log(f"reward/{name}", sum(values), len(values))
            self.log("reward", float(scores.total.double().sum()), len(samples))
        self.keep(samples, scores, rows=rows, step=self.step, evaluating=self.evaluating)
        self.emit(
            "rollouts_scored",
            step=self.step,
            samples=samples,
            rewards=scores.total.tolist(),
            evaluating=self.evaluating,
        )
        return scores

    def log(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Report total / count, each added up over the processes and over the calls until the next step, with that step's row."""
        self._tally.add({name: (total, count)})

    def emit(self, event: str, **values: Any) -> None:
        """Tell the hooks of an event; see `rlhf_core.registry.hooks.Events`."""
        self.notify(event, run=self.trainer, **values)

    def held_out_loss(self, batch: Batch) -> Evaluation:
        """Return the loss of held-out rows and its metrics, by `experience`, `weights` and `loss` as in training."""
        from rlhf_core.training.held_out import held_out_loss

        return held_out_loss(self.trainer, batch, self)

    def for_evaluation(self) -> RunContext:
        """Return the context in which held-out rows are scored."""
        return replace(self, evaluating=True)

    def pending(self) -> dict[str, tuple[float, float]]:
        """Return what `log` was given since the last step, (sum, count) by name."""
        return self._tally.totals()

    def logged(self) -> dict[str, tuple[float, float]]:
        """Return what `log` was given since the last call, (sum, count) by name."""
        totals = self._tally.totals()
        self._tally.clear()
        return totals
