"""The stream of batches that a trainer learns from: one window of rows for each optimiser step, on every process its share.

All processes walk the same order of rows and cut it into the same windows, so which rows make a step doesn't depend on how
many processes there are, and the state is one position for all of them.
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
"""Epoch, position in it, rows drawn in it, rows drawn in all."""


class DataStream:
    """An iterator of batches: each is this process's share of the rows of one optimiser step.

    Rows that an epoch leaves over begin the next epoch's first window; the last window of all may be smaller. Where it has fewer
    rows than there are processes, the batches of some are empty: how many windows there are never depends on the processes.
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
    ) -> None:
        """Take what to walk and how.

        Args:
            dataset: map-style or streaming.
            batch_size: rows in a window, over all processes.
            epochs: passes over the data; None never ends. A stream whose rows aren't counted yet can't end within its first
                pass.
            seed: the order of rows is a function of this and the epoch.
            shuffle: False keeps the data's order.
            rank, world_size: which process of how many this is.
            held_out: whether rows are only scored: there may then be fewer of them than processes.

        Raises:
            ConfigError: the processes can't share the windows evenly, or the end can't be told.
        """
        _check_shares(batch_size, world_size, None if held_out else dataset.num_rows)
        if epochs is not None and epochs < 1 and dataset.num_rows is None:
            raise ConfigError(
                "a streaming dataset doesn't know where part of its first epoch ends",
                place="epochs",
                got=str(epochs),
                fix="set `max_steps`, whole `epochs`, or `dataset.streaming: false`",
            )
        self.dataset, self.batch_size, self.epochs = dataset, batch_size, epochs
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self._held_out = held_out
        self._state: _State = (0, [], 0, 0)
        self._ahead: deque[tuple[RowOutcome | None, _State]] = deque()
        self._waiting = 0
        self._rows = self._walk(self._state)
        if dataset.streaming and not dataset.report.complete:
            dataset.report.reset()

    @property
    def epoch(self) -> int:
        """The epoch that the last row came from, counted from 0."""
        return self._state[0]

    @property
    def steps(self) -> int | None:
        """Windows from beginning to end; None where the rows aren't counted yet, or there is no end."""
        total = self._total(self.dataset.num_rows)
        if total is None:
            return None
        windows, left = divmod(total, self.batch_size)
        return windows + (left > 0)

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
        window: list[EncodedRow] = []
        first = self._state[3]
        while len(window) < self.batch_size and self._look_ahead(1):
            window.append(self._take())
        if not window:
            raise StopIteration
        self._look_ahead(1)  # after the last row, so that what was refused behind it is counted
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
        """Return the place after the last batch, as JSON values. It is the same on every process, for any number of them."""
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
        """Go on from where `state_dict` was taken.

        Raises:
            DataError: the data, or how they are encoded, are not what they were.
            ConfigError: the order of rows is another.
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
        """Return the rows of all epochs together, given those of one."""
        # Rounded first: 0.1 + 0.2 epochs of ten rows are three rows, not four.
        return None if rows is None or self.epochs is None else max(1, math.ceil(round(self.epochs * rows, 6)))

    def _walk(self, state: _State) -> Iterator[tuple[RowOutcome | None, _State]]:
        """Yield what becomes of each row, from a state on, with the state after it; None where the first epoch ends."""
        epoch, position, in_epoch, drawn = state
        rows = self.dataset.num_rows
        total = self._total(rows)
        while total is None or drawn < total:
            walk = self.dataset.walk(epoch, seed=self.seed, shuffle=self.shuffle, position=position)
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
            epoch, position, in_epoch = epoch + 1, [], 0

    def _look_ahead(self, wanted: int) -> int:
        """Read on until so many rows wait, or the end; return how many do."""
        while self._waiting < wanted and (item := next(self._rows, None)) is not None:
            self._ahead.append(item)
            self._waiting += item[0] is not None and item[0].row is not None
        if self._waiting == 0:
            # The end: what was refused after the last row counts too.
            while self._ahead:
                self._pop()
        return self._waiting

    def _take(self) -> EncodedRow:
        """Return the next row that waits; what was refused before it is counted now."""
        while (row := self._pop()) is None:
            pass
        self._waiting -= 1
        return row

    def _pop(self) -> EncodedRow | None:
        outcome, self._state = self._ahead.popleft()
        report = self.dataset.report
        if outcome is None:
            report.finish()
            return None
        if self.dataset.streaming and not report.complete:
            report.add(outcome, strict=self.dataset.options.strict)
            if outcome.row is not None:
                report.warn_of_first_rows()
        return outcome.row


def shares(rows: Sequence[EncodedRow], world_size: int) -> list[list[int]]:
    """Deal a window's rows to processes so that their tokens are about equal; each gets one where there are enough.

    The longest row goes first, each to the process with the fewest tokens so far; a process's rows keep the window's order.
    """
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for number in sorted(range(len(rows)), key=lambda row: -rows[row].num_tokens):
        least = min(range(world_size), key=tokens.__getitem__)
        dealt[least].append(number)
        tokens[least] += rows[number].num_tokens
    return [sorted(numbers) for numbers in dealt]


def _check_shares(batch_size: int, world_size: int, rows: int | None) -> None:
    if batch_size % world_size:
        below, above = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
        raise ConfigError(
            f"{batch_size} rows a step can't be shared evenly by {world_size} processes"
            f" ({batch_size} = {batch_size // world_size} × {world_size} + {batch_size % world_size})",
            place="batch_size",
            fix=f"use {below} or {above}" if below else f"use {above}",
        )
    if rows is not None and rows < world_size:
        raise ConfigError("fewer rows than processes", place="data", got=f"{rows} rows, {world_size} processes")
