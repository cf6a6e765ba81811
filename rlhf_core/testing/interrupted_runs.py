"""Training runs that are interrupted, and the comparison of a resumed run with one that was never interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Trainer, Window
from rlhf_core.testing.contract import require
from rlhf_core.training.checkpoint import CheckpointManager
from rlhf_core.training.context import RunContext
from rlhf_core.training.logger import without_timing


class StoppedEarly(Exception):
    """Raised by an interruptible trainer after `stop_after` windows."""


def interruptible(cls: type[Trainer]) -> type[Trainer]:
    """Return a subclass of a trainer whose `experience` raises `StoppedEarly` in place of window number `stop_after`, from 0."""

    class Interruptible(cls):  # type: ignore[valid-type, misc]
        stop_after: int | None = None

        def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
            for number, window in enumerate(super().experience(stream, run)):
                if number == self.stop_after:
                    raise StoppedEarly
                yield window

    # Messages and the run's record name the method, not this wrapper.
    Interruptible.__name__, Interruptible.__qualname__ = cls.__name__, cls.__qualname__
    return Interruptible


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl without their timings."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [without_timing(row) for row in rows]


def require_same_run(found: Path, expected: Path, what: str = "a resume") -> None:
    """Fail unless two finished runs are equal bit by bit: in metrics, and at the end in models, optimiser and states.

    Args:
        found: run directory of the run that was resumed.
        expected: run directory of the run that was never interrupted.
        what: what interrupted the first run, for messages.
    """
    rows, wanted = metrics_of(found), metrics_of(expected)
    require(
        len(rows) == len(wanted),
        f"the resumed run has {len(rows)} rows of metrics, the uninterrupted run {len(wanted)}",
    )
    for row, want in zip(rows, wanted, strict=True):
        different = sorted(name for name in row.keys() | want.keys() if row.get(name) != want.get(name))
        require(
            not different,
            f"metrics of step {want['step']} differ after {what}: "
            + ", ".join(f"`{name}` {row.get(name)!r} instead of {want.get(name)!r}" for name in different[:3])
            + "; return from `state_dict` whatever the method remembers from one window to the next",
        )
    last, want_last = (CheckpointManager(path / "checkpoints").load_latest() for path in (found, expected))
    assert last is not None and want_last is not None  # a run saves at its end
    for group in ("model", "optimizer"):
        tensors, want_tensors = last.tensors(group), want_last.tensors(group)
        different = [name for name in want_tensors if not torch.equal(tensors[name], want_tensors[name])]
        require(not different, f"after {what} the run ends with other {group} tensors: {', '.join(different[:4])}")
    for rank, (own, want_own) in enumerate(zip(last.state["ranks"], want_last.state["ranks"], strict=True)):
        different = [name for name in want_own if own[name] != want_own[name]]
        require(not different, f"after {what} process {rank} ends with another state of {', '.join(different)}")
