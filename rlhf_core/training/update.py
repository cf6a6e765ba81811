"""One optimiser update: gradients summed over micro-batches, one global denominator, no step on what isn't finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Pair, Trainer
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import NumbersError, PluginError, list_rows
from rlhf_core.infra.out_of_memory import try_to_fit
from rlhf_core.infra.seeds import RandomState
from rlhf_core.models.gradient_sums import summing_in_place
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.elastic_weights import METRIC, ElasticWeights
from rlhf_core.training.loss_scale import LossScale
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.optimizer import AnyOptimizer
from rlhf_core.training.reduction import Tally, numbers, objective, quotients, sum_pairs, total_weights
from rlhf_core.training.rollout_record import NUMBER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpdateResult:
    """The numbers of one update, over all micro-batches and processes."""

    loss: float
    """Of the whole step, before the update."""
    grad_norm: float
    """Total 2-norm of the gradients before clipping."""
    tokens: int
    """Real tokens over all processes, each prompt counted once."""
    metrics: dict[str, float] = field(default_factory=dict)
    responses: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    """By name of a pair in `Loss.responses`, (sum, count) by the number of each of this process's responses in the rollout."""


@dataclass
class _MicroBatchSums:
    """The sums of one process over its micro-batches of a step; values stay on the device until `read`."""

    terms: Tally = field(default_factory=Tally)
    metrics: Tally = field(default_factory=Tally)
    shares: list[tuple[Tensor, tuple[int, ...]]] = field(default_factory=list)
    """Each micro-batch's share of the loss with its rows, to name the rows of one that isn't finite."""
    responses: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By name, the numbers (R,) of a micro-batch's responses with their sums and counts (R, 2)."""

    def add_responses(self, micro: Batch, pairs: Mapping[str, Pair], *, place: str) -> None:
        """Add what `Loss.responses` says of a micro-batch whose responses are numbered."""
        for name, pair in pairs.items():
            values = [value.detach() if isinstance(value, Tensor) else torch.tensor(value) for value in pair]
            wrong = [value for value in values if tuple(value.shape) != (micro.num_responses,)]
            if wrong:
                raise PluginError(
                    f"`responses` must have one sum and one count of `{name}` per response",
                    place=f"{place}.loss",
                    got=f"shape {tuple(wrong[0].shape)} for {micro.num_responses} responses",
                )
            if NUMBER in micro.per_response:
                both = torch.stack([value.float() for value in values], dim=1)
                self.responses.setdefault(name, []).append((micro[NUMBER], both))

    def read_responses(self) -> dict[str, dict[int, tuple[float, float]]]:
        """Return (sum, count) by name and by the response's number."""
        return {
            name: {
                int(number): (pair[0], pair[1])
                for number, pair in zip(
                    torch.cat([numbers for numbers, _ in parts]).tolist(),
                    torch.cat([values for _, values in parts]).tolist(),
                    strict=True,
                )
            }
            for name, parts in self.responses.items()
        }

    def read(self, norms: Mapping[str, Tensor]) -> _StepNumbers:
        """Return all sums and the gradient norms by role as numbers, read from the device at once: the one wait of a step."""
        shares = [share for share, _ in self.shares]
        terms, metrics = self.terms.values, self.metrics.values
        found = iter(numbers([*norms.values(), *shares, *terms, *metrics]))
        return _StepNumbers(
            norms=dict(zip(norms, found, strict=False)),
            shares=list(islice(found, len(shares))),
            terms=self.terms.totals(list(islice(found, len(terms)))),
            metrics=self.metrics.totals(list(found)),
        )


@dataclass(frozen=True)
class _StepNumbers:
    """The sums of one process in a step, read from the device; gradient norms are those over all processes."""

    norms: dict[str, float]
    """2-norm of each role's gradients before clipping."""
    shares: list[float]
    """Each micro-batch's share of the loss."""
    terms: dict[str, tuple[float, float]]
    """(sum, 0) of each loss term."""
    metrics: dict[str, tuple[float, float]]
    """(sum, count) of each metric."""

    @property
    def norm(self) -> float:
        """Total 2-norm of the gradients."""
        return next(iter(self.norms.values())) if len(self.norms) == 1 else math.hypot(*self.norms.values())


class Updater:
    """Makes the optimiser steps of a run, one per window.

    Args:
        trainer: the method, its models built and on the device.
        optimizer: has all of its trained parameters.
        parameters: these by name, which begins with the role, in an order that is the same in every step and process.
        elastic: the penalty of elastic weight consolidation, where the run has one.
        notify: called with the name and fields of an event.
    """

    def __init__(
        self,
        trainer: Trainer,
        optimizer: AnyOptimizer,
        parameters: Mapping[str, nn.Parameter],
        *,
        distribution: Distribution,
        devices: DeviceManager,
        micro_batches: MicroBatches,
        loss_scale: LossScale,
        notify: Callable[..., None],
        elastic: ElasticWeights | None = None,
    ) -> None:
        self.trainer, self.optimizer, self.parameters = trainer, optimizer, list(parameters.values())
        self.roles: dict[str, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            self.roles.setdefault(name.partition(".")[0], []).append(parameter)
        self.distribution, self.devices, self.micro_batches = distribution, devices, micro_batches
        self.loss_scale, self.notify, self.elastic = loss_scale, notify, elastic
        self.config = trainer.config
        self.place = type(trainer).__name__
        self._names: list[str] | None = None
        self.untouched = set(self.roles)
        """Roles whose parameters have had no gradient in any step yet."""

    def __call__(self, window: Batch, step: int) -> UpdateResult | None:
        """Make one optimiser step on a window; return None, with nothing changed, where every weight is zero.

        Where memory runs out, the same update is made again in micro-batches of half the size; where gradients of float16
        overflow, at half the loss scale.

        Raises:
            NumbersError: a loss or gradient isn't finite, or one row doesn't fit in memory; nothing was stepped.
        """
        while True:
            micros = self.micro_batches.cut(window)
            counted = [self.trainer.weights(micro) for micro in micros]
            weights = self._global_weights(counted)
            if not any(weights.values()):
                return None
            random = RandomState.capture()
            sums = self._accumulate(micros, counted, weights)
            if self.distribution.any(sums is None):
                self._shrink(micros, step)
            else:
                assert sums is not None
                read = sums.read(self._gradient_norms(sums))
                self._refuse_loss(sums, read, step)
                if math.isfinite(read.norm):
                    self._clip(read.norms)
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                    self.loss_scale.succeeded()
                    return self._result(read, weights, window, sums.read_responses())
                if not self.loss_scale.overflowed():
                    self._refuse_gradient(window, read.norm, step)
            self.optimizer.zero_grad(set_to_none=True)
            random.restore()

    def _global_weights(self, counted: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return what each loss term is averaged over: its weights added up over micro-batches and processes."""
        if self._names is None:
            # A process whose share of the rows is empty takes the terms' names from the others.
            known = self.distribution.gather(sorted(counted[0]) if counted else None)
            self._names = next((names for names in known if names is not None), None)
            if self._names is None:
                return {}
        local = total_weights(counted, self._names, place=self.place)
        return dict(zip(self._names, self.distribution.sum([local[name] for name in self._names]), strict=True))

    def _accumulate(
        self, micros: Sequence[Batch], counted: Sequence[Mapping[str, float]], weights: dict[str, float]
    ) -> _MicroBatchSums | None:
        """Run forward and backward over this process's micro-batches; return None where memory ran out."""
        sums = _MicroBatchSums()

        def work() -> None:
            for micro, own in zip(micros, counted, strict=True):
                if any(own.values()):
                    self._backward(micro.to(self.devices.device), weights, sums)

        return sums if try_to_fit(work, self.devices.device) is not None else None

    def _backward(self, micro: Batch, weights: dict[str, float], sums: _MicroBatchSums) -> None:
        """Add a micro-batch's share of the loss to the gradients, and its terms and metrics to the sums."""
        with self.devices.autocast(self.config.precision):
            loss = self.trainer.loss(micro)
        share = objective(loss.terms, weights, place=self.place)
        sums.terms.add({name: (term, 0.0) for name, term in loss.terms.items() if weights[name] > 0})
        sums.metrics.add(loss.metrics)
        sums.add_responses(micro, loss.responses, place=self.place)
        if share is not None:
            sums.shares.append((share.detach(), micro.rows))
            # A micro-batch may touch no trained parameter, such as one whose every response lies outside a term's mask.
            if share.requires_grad:
                with summing_in_place():
                    (share if self.loss_scale.value == 1 else share * self.loss_scale.value).backward()

    def _shrink(self, micros: Sequence[Batch], step: int) -> None:
        """Halve the size of micro-batches on all processes, or refuse where one is a single row already."""
        sizes = self.micro_batches
        largest = max(self.distribution.gather(max(map(sizes.count, micros), default=0)))
        if not sizes.halve(largest):
            raise NumbersError(
                f"out of memory with one {sizes.unit} per forward pass",
                place=f"step {step}",
                fix="set `gradient_checkpointing: true`, a smaller `max_length`, or `lora`",
            )
        several = f"{sizes.size} {sizes.unit}" + "s" * (sizes.size != 1)
        log.warning("step %d: out of memory; micro-batches of %s from now on", step, several)
        self.notify("out_of_memory", step=step, micro_batch_size=sizes.size)

    def _gradient_norms(self, sums: _MicroBatchSums) -> dict[str, Tensor]:
        """Add up gradients over the processes, undo the loss scale, add the penalty's; return 2-norms by role, on the device."""
        self.distribution.sum_gradients(self.parameters)
        by_role = {role: gradients for role in self.roles if (gradients := self._gradients(role))}
        if not by_role:
            raise PluginError("the loss gives no trained parameter a gradient", place=f"{self.place}.loss")
        self.untouched -= by_role.keys()
        if self.loss_scale.value != 1:
            torch._foreach_div_(
                [gradient for gradients in by_role.values() for gradient in gradients], self.loss_scale.value
            )
        if self.elastic is not None:
            # Once per step, behind all sums: no micro-batch, process or loss scale changes its share.
            sums.metrics.add({METRIC: (self.elastic.add_gradients(), 1.0)})
            by_role = {role: gradients for role in self.roles if (gradients := self._gradients(role))}
        return {role: self.distribution.norm(gradients) for role, gradients in by_role.items()}

    def _clip(self, norms: Mapping[str, float]) -> None:
        """Scale each role's gradients down to `max_grad_norm`: one role's large loss must not take another's step."""
        for role, norm in norms.items():
            self.distribution.clip(self._gradients(role), norm, self.config.max_grad_norm)

    def _gradients(self, role: str) -> list[Tensor]:
        """Return the gradients of a role's parameters; those without one are left out."""
        return [parameter.grad for parameter in self.roles[role] if parameter.grad is not None]

    def _refuse_loss(self, sums: _MicroBatchSums, read: _StepNumbers, step: int) -> None:
        """Raise if any process has a share of the loss that isn't finite, with the rows of these micro-batches."""
        shares = read.shares
        rows = [
            row
            for value, (_, rows) in zip(shares, sums.shares, strict=True)
            if not math.isfinite(value)
            for row in rows
        ]
        if not self.distribution.any(bool(rows)):
            return
        found = [row for part in self.distribution.gather(rows) for row in part]
        values = [value for value in shares if not math.isfinite(value)]
        raise NumbersError(
            f"the loss is not finite on {list_rows(found, 16)}; nothing was stepped",
            place=f"step {step}",
            got=values[0] if values else "a value that is not finite on another process",
            fix="look at these rows, or lower `learning_rate`",
        )

    def _refuse_gradient(self, window: Batch, norm: float, step: int) -> None:
        """Raise for a gradient norm that isn't finite, with all rows of the step."""
        rows = [row for part in self.distribution.gather(list(window.rows)) for row in part]
        raise NumbersError(
            f"the gradient's norm is not finite on {list_rows(rows, 16)}; nothing was stepped",
            place=f"step {step}",
            got=norm,
            fix="look at these rows, or lower `learning_rate`",
        )

    def _result(
        self,
        read: _StepNumbers,
        weights: dict[str, float],
        window: Batch,
        responses: dict[str, dict[int, tuple[float, float]]],
    ) -> UpdateResult:
        """Return the step's averages: each process's sums added up, over the global weights."""
        names = list(weights)
        totals = self.distribution.sum([*(read.terms.get(name, (0.0, 0.0))[0] for name in names), window.num_tokens])
        terms = {name: total / weights[name] for name, total in zip(names, totals, strict=False) if weights[name] > 0}
        metrics = quotients(sum_pairs(self.distribution, read.metrics))
        if len(read.norms) > 1:
            metrics = {f"grad_norm_{role}": norm for role, norm in read.norms.items()} | metrics
        if len(names) > 1:
            metrics = {f"loss_{name}": value for name, value in terms.items()} | metrics
        loss = sum(terms.values()) + (metrics[METRIC] if self.elastic is not None else 0.0)
        return UpdateResult(loss, read.norm, int(totals[-1]), metrics, responses)
