"""The windows of a method's `experience`, counted against its `windows_per_batch`."""

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
        counted: whether the length of the run follows from `windows_per_batch`, so that its number must be right.
        batches_used: returns how many batches had been taken when the last step was made.
    """

    def __init__(
        self,
        trainer: Trainer[Any],
        stream: DataStream,
        run: RunContext,
        *,
        counted: bool,
        batches_used: Callable[[], int],
    ) -> None:
        self._trainer, self._stream, self._run = trainer, stream, run
        self._per_batch = trainer.windows_per_batch() if counted else None
        self._batches_used = batches_used
        self._before, self._made, self._inside, self._held_at = stream.batches, 0, False, 0
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
        """Warn if fewer windows were made than the learning rate's schedule has steps for."""
        if self._per_batch is None:
            return
        expected = self._per_batch * (self._stream.batches - self._before)
        if self._made < expected and next(self._stream, None) is None:
            log.warning(
                "%s made %d windows where `windows_per_batch` says %d: the learning rate didn't reach its schedule's end",
                type(self._trainer).__name__, self._made, expected,
            )  # fmt: skip

    def _batches(self) -> Iterator[Batch]:
        """Yield the run's batches to the method; refuse one inside a rollout, and more than `max_idle_batches` without a step."""
        most = self._trainer.config.max_idle_batches
        for batch in self._stream:
            if self._inside:
                raise PluginError(
                    "takes a new batch before it has yielded the rollout's last window, so no checkpoint could be saved",
                    place=f"{type(self._trainer).__name__}.experience",
                    fix="yield a rollout's last window as `Window(batch)`",
                )
            if self._run.held:
                self._held_at = self._stream.batches - 1
            if (idle := self._stream.batches - max(self._batches_used(), self._held_at)) > most:
                raise NumbersError(
                    f"{idle - 1} batch{'es' * (idle > 2)} in a row gave nothing to learn from",
                    place=f"step {self._run.step + 1}",
                    got=f"rows {list(batch.rows)[:16]} next{self._rewards()}",
                    fix="look at the loss mask of these rows, or at the rewards; a larger `max_idle_batches` allows more of them",
                )
            self._run.held = False
            yield batch

    def _rewards(self) -> str:
        """Return the rewards of completions that were generated since the last step, for a message; "" where there are none."""
        record = self._run.rollout
        return f"; rewards {record.rewards_shown()}" if any(one.rewards for one in record.latest) else ""

    def _check_count(self) -> None:
        """Refuse a number of windows that doesn't fit the batches taken so far."""
        if self._per_batch is None:
            return
        taken = self._stream.batches - self._before
        # Checkpoints are saved at the end of a rollout, so a batch that was taken before may not be used after it.
        expected = self._per_batch * taken
        if self._made == expected or (self._inside and self._made < expected):
            return
        raise PluginError(
            f"must yield {self._per_batch} windows per batch, as `windows_per_batch` says: the length of the run follows from it",
            place=f"{type(self._trainer).__name__}.experience",
            got=f"{self._made} windows from {taken} batches",
            fix="return the right number, or None where the data decide; a run of `max_steps` needs neither",
        )
