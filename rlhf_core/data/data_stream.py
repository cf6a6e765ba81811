"""The stream of training batches: one window of rows for each optimiser step, of which every process gets its share.

All processes read the rows in the same order and divide them into the same windows. So the rows of a step don't depend on the
number of processes, and the state is one position that is valid for all of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_core.contracts.batch import Batch
from rlhf_core.data.collate import collate
from rlhf_core.data.encoded_data import EncodedData, Position
from rlhf_core.data.encoder import EncodedRow, RowOutcome
from rlhf_core.infra.errors import ConfigError, DataError

_State = tuple[int, Position, int, int]
"""Epoch, position within it, rows taken from it, rows taken since the beginning."""


class DataStream:
    """Iterates over batches: each is this process's share of the rows of one optimiser step.

    Rows left over at the end of an epoch begin the first window of the next; only the very last window may be smaller. If it has
    fewer rows than there are processes, some processes get an empty batch, so the number of windows is the same for all.
    """

    def __init__(
        self,
        dataset: EncodedData,
        *,
        batch_size: int,
        epochs: float | None = 1.0,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        held_out: bool = False,
        once: bool = False,
    ) -> None:
        """Start at the beginning of the first epoch.

        Args:
            dataset: map-style or streaming.
            batch_size: rows in a window, over all processes.
            epochs: passes over the data; None never ends. Part of a first epoch needs a dataset that knows its number of rows.
            seed: the order of rows is a function of this and the epoch.
            shuffle: False keeps the data's order.
            rank, world_size: this process's number, and how many processes there are.
            held_out: whether the rows are for evaluation; there may then be fewer of them than processes.
            once: take every row once in an epoch, also where they are drawn by shares.

        Raises:
            ConfigError: `batch_size` isn't divisible by the number of processes, there are fewer rows than processes, or part of
                a first epoch is asked for, or an epoch of rows drawn by shares, and the number of rows isn't known.
        """
        _check_shares(batch_size, world_size, None if held_out else dataset.num_rows)
        if epochs is not None and epochs < 1 and dataset.num_rows is None:
            raise ConfigError(
                "a streaming dataset doesn't know its number of rows, so part of its first epoch has no end",
                place="epochs",
                got=str(epochs),
                fix="set `max_steps`, whole `epochs`, or `dataset.streaming: false`",
            )
        if epochs is not None and dataset.mixed and not once and dataset.num_rows is None:
            raise ConfigError(
                "rows drawn from a stream by shares have no end",
                place="epochs",
                got=f"{epochs:g}, and `dataset.streaming`",
                fix="set `max_steps`, or `dataset.streaming: false`",
            )
        self.dataset, self.batch_size, self.epochs = dataset, batch_size, epochs
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self._held_out, self._once = held_out, once
        self._state: _State = (0, [], 0, 0)
        self._ahead: deque[tuple[RowOutcome | None, _State]] = deque()
        self._waiting = 0
        self._rows = self._walk(self._state)
        if dataset.streaming and not dataset.report.complete:
            dataset.report.reset()

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last row came from, from 0."""
        return self._state[0]

    @property
    def steps(self) -> int | None:
        """Number of windows from beginning to end; None where the number of rows isn't known yet, or the stream is endless."""
        total = self._total(self.dataset.num_rows)
        if total is None:
            return None
        windows, left = divmod(total, self.batch_size)
        return windows + (left > 0)

    @property
    def at_smaller_end(self) -> bool:
        """Whether the next window is the last and, as far as is known, has fewer rows than the others."""
        total = self._total(self.dataset.num_rows)
        return total is not None and 0 < total - self._state[3] < self.batch_size

    @property
    def batches(self) -> int:
        """Windows taken so far, from the beginning of the first epoch."""
        return -(-self._state[3] // self.batch_size)

    @property
    def rows(self) -> int:
        """Rows taken so far by all processes, from the beginning of the first epoch."""
        return self._state[3]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return this process's share of the next window; every process must take as many."""
        window: list[EncodedRow] = []
        first = self._state[3]
        while len(window) < self.batch_size and self._look_ahead(1):
            window.append(self._take())
        if not window:
            raise StopIteration
        self._look_ahead(1)  # refused rows after the last one are counted now
        if self._state[3] < self.world_size and not self._waiting and not self._held_out:
            raise ConfigError(
                "fewer rows than processes",
                place=self.dataset.source.name,
                got=f"{len(window)} rows, {self.world_size} processes",
            )
        share = shares(window, self.world_size)[self.rank]
        if not share:
            return collate(window[:1]).select([])
        return replace(collate([window[number] for number in share]), places=tuple(first + number for number in share))

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON values. It is the same on every process, for any number of them."""
        epoch, position, in_epoch, drawn = self._state
        return {
            "epoch": epoch,
            "position": list(position),
            "rows_in_epoch": in_epoch,
            "rows": drawn,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self.dataset.fingerprint,
            "report": self.dataset.report.state_dict() if self.dataset.streaming else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of a `state_dict`.

        Raises:
            DataError: the data, the tokenizer or the options changed since then.
            ConfigError: `seed` or `shuffle` changed, and so the order of rows.
        """
        if state["fingerprint"] != self.dataset.fingerprint:
            raise DataError(
                "the data, the tokenizer, or how rows are read changed since the checkpoint",
                place=self.dataset.source.name,
                got=f"fingerprint {self.dataset.fingerprint[:12]}, saved {state['fingerprint'][:12]}",
                fix="resume with what the run was started with, or start a new run",
            )
        for name in ("seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise ConfigError(
                    f"`{name}` changed since the checkpoint, and the order of rows with it",
                    place="resume",
                    got=f"{getattr(self, name)}, saved {state[name]}",
                )
        if self.dataset.streaming:
            self.dataset.report.load_state_dict(state["report"])
        self._state = (state["epoch"], list(state["position"]), state["rows_in_epoch"], state["rows"])
        self._ahead.clear()
        self._waiting = 0
        self._rows = self._walk(self._state)

    def _total(self, rows: int | None) -> int | None:
        """Return the number of rows of all epochs together, given that of one; None where it isn't known or endless."""
        # Rounded first: 0.1 + 0.2 epochs of ten rows are three rows, not four.
        return None if rows is None or self.epochs is None else max(1, math.ceil(round(self.epochs * rows, 6)))

    def _walk(self, state: _State) -> Iterator[tuple[RowOutcome | None, _State]]:
        """Yield the outcome of each row with the state after it, from a state on; and None where the first epoch ends."""
        epoch, position, in_epoch, drawn = state
        rows = self.dataset.num_rows
        total = self._total(rows)
        while total is None or drawn < total:
            walk = self._epoch_from(epoch, position)
            for outcome, position in walk:
                if outcome.row is not None:
                    if drawn == total:
                        return
                    in_epoch, drawn = in_epoch + 1, drawn + 1
                yield outcome, (epoch, position, in_epoch, drawn)
            if rows is None:
                rows, total = in_epoch, self._total(in_epoch)
                yield None, (epoch, position, in_epoch, drawn)
            if not rows:
                return
            drawn_on = self.dataset.mixed and not self._once  # each part has epochs of its own, which go on
            epoch, position, in_epoch = epoch + 1, position if drawn_on else [], 0

    def _epoch_from(self, epoch: int, position: Position) -> Iterator[tuple[RowOutcome, Position]]:
        """Yield an epoch's rows from a position on, each with the position after it."""
        if self._once:
            return self.dataset.walk(epoch, seed=self.seed, shuffle=self.shuffle, position=position)
        return self.dataset.draw(epoch, seed=self.seed, shuffle=self.shuffle, position=position)

    def _look_ahead(self, wanted: int) -> int:
        """Read until `wanted` rows wait to be taken, or the end is reached; return how many wait."""
        while self._waiting < wanted and (item := next(self._rows, None)) is not None:
            self._ahead.append(item)
            self._waiting += item[0] is not None and item[0].row is not None
        if self._waiting == 0:
            # At the end, refused rows after the last one are counted, too.
            while self._ahead:
                self._pop()
        return self._waiting

    def _take(self) -> EncodedRow:
        """Take the next row that waits, and count the refused rows before it."""
        while (row := self._pop()) is None:
            pass
        self._waiting -= 1
        return row

    def _pop(self) -> EncodedRow | None:
        """Take the next outcome, count it where a stream is read for the first time, and return its row; None if refused."""
        outcome, self._state = self._ahead.popleft()
        report = self.dataset.report
        if outcome is None:
            report.finish()
            return None
        if self.dataset.streaming and not report.complete and not outcome.again:
            report.add(outcome, strict=self.dataset.options.strict)
            if outcome.row is not None:
                report.warn_of_first_rows()
        return outcome.row


def shares(rows: Sequence[EncodedRow], world_size: int) -> list[list[int]]:
    """Divide a window's rows among processes so that each gets about as many tokens, and at least one row if there are enough.

    The longest row is given first, each to the process with the fewest tokens so far.

    Returns:
        for each process the numbers of its rows, in the window's order.
    """
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for number in sorted(range(len(rows)), key=lambda row: -rows[row].num_tokens):
        least = min(range(world_size), key=tokens.__getitem__)
        dealt[least].append(number)
        tokens[least] += rows[number].num_tokens
    return [sorted(numbers) for numbers in dealt]


def _check_shares(batch_size: int, world_size: int, rows: int | None) -> None:
    """Raise `ConfigError` where the processes can't have equal shares of a window, or one would never get a row."""
    if batch_size % world_size:
        below, above = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
        raise ConfigError(
            f"{batch_size} rows per step can't be divided evenly among {world_size} processes"
            f" ({batch_size} = {batch_size // world_size} × {world_size} + {batch_size % world_size})",
            place="batch_size",
            fix=f"use {below} or {above}" if below else f"use {above}",
        )
    if rows is not None and rows < world_size:
        raise ConfigError("fewer rows than processes", place="data", got=f"{rows} rows, {world_size} processes")
