"""A method's windows as the loop takes them: one after the other, counted against what the method says of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Trainer, Window
from rlhf_core.data import DataStream
from rlhf_core.infra.errors import NumbersError, PluginError
from rlhf_core.training.context import RunContext

log = logging.getLogger(__name__)


class Windows:
    """An iterator of the windows that a method's `experience` makes of a stream.

    Args:
        trainer: the method.
        stream: the run's data, at the beginning of a rollout.
        run: the run context.
        counted: whether `windows_per_batch` decides how long the run is, so that it must hold.
        last_used: returns how many batches had been taken when the last step was made.
    """

    def __init__(
        self, trainer: Trainer[Any], stream: DataStream, run: RunContext, *, counted: bool, last_used: Callable[[], int]
    ) -> None:
        self._trainer, self._stream, self._run = trainer, stream, run
        self._per_batch = trainer.windows_per_batch() if counted else None
        self._last_used = last_used
        self._before, self._made, self._inside = stream.batches, 0, False
        self._windows = iter(trainer.experience(self._batches(), run))

    def __iter__(self) -> Iterator[Window]:
        return self

    def __next__(self) -> Window:
        made = next(self._windows)
        window = made if isinstance(made, Window) else Window(made)
        if not isinstance(window.batch, Batch):
            raise PluginError(
                "yields what is neither a `Batch` nor a `Window` of one",
                place=f"{type(self._trainer).__name__}.experience",
                got=type(made).__name__,
            )
        self._made += 1
        self._inside = not window.last
        self._check_count()
        return window

    def finish(self) -> None:
        """Say where fewer windows were made than the schedule was laid out for."""
        if self._per_batch is None:
            return
        expected = self._per_batch * (self._stream.batches - self._before)
        if self._made < expected and next(self._stream, None) is None:
            log.warning(
                "%s made %d windows where `windows_per_batch` says %d: the learning rate stopped before its schedule's end",
                type(self._trainer).__name__, self._made, expected,
            )  # fmt: skip

    def _batches(self) -> Iterator[Batch]:
        most = self._trainer.config.max_idle_batches
        for batch in self._stream:
            if self._inside:
                raise PluginError(
                    "takes a new batch before a window of the rollout was its last: no checkpoint could be saved",
                    place=f"{type(self._trainer).__name__}.experience",
                    fix="yield a rollout's last window as `Window(batch)`",
                )
            if (idle := self._stream.batches - self._last_used()) > most:
                raise NumbersError(
                    f"{idle - 1} batches in a row gave nothing to learn from",
                    place=f"step {self._run.step + 1}",
                    got=f"rows {list(batch.rows)[:16]} next",
                    fix="look at the loss mask of these rows, or at the rewards; a larger `max_idle_batches` waits longer",
                )
            yield batch

    def _check_count(self) -> None:
        if self._per_batch is None:
            return
        taken = self._stream.batches - self._before
        # Checkpoints are saved where a rollout ends, so nothing that was taken from the data may be held back there.
        expected = self._per_batch * taken
        if self._made == expected or (self._inside and self._made < expected):
            return
        raise PluginError(
            f"`windows_per_batch` says {self._per_batch}, on which the length of the run rests",
            place=f"{type(self._trainer).__name__}.experience",
            got=f"{self._made} windows from {taken} batches",
            fix="return the right number, or None where the data decide; a run of `max_steps` needs neither",
        )
