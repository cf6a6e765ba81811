"""Runs of a trainer: broken off, resumed, and compared with one that wasn't."""

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
from rlhf_core.training.logger import TIMING


class Interrupted(Exception):
    """An interruptible trainer broke off, as it was told to."""


def interruptible(cls: type[Trainer]) -> type[Trainer]:
    """Return a subclass that raises `Interrupted` when asked for the window after its first `stop_after`."""

    class Interruptible(cls):  # type: ignore[valid-type, misc]
        stop_after: int | None = None

        def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
            for number, window in enumerate(super().experience(stream, run)):
                if number == self.stop_after:
                    raise Interrupted
                yield window

    # Messages and the run's record name the method, not this wrapper.
    Interruptible.__name__, Interruptible.__qualname__ = cls.__name__, cls.__qualname__
    return Interruptible


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Return a run's rows of metrics without their timing."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def require_same_run(found: Path, expected: Path, what: str = "a resume") -> None:
    """Fail unless two finished runs have the same bits: metrics, and models, optimiser and states at the end."""
    rows, wanted = metrics_of(found), metrics_of(expected)
    require(len(rows) == len(wanted), f"the resumed run has {len(rows)} rows of metrics, the whole one {len(wanted)}")
    for row, want in zip(rows, wanted, strict=True):
        different = sorted(name for name in row.keys() | want.keys() if row.get(name) != want.get(name))
        require(
            not different,
            f"step {want['step']} differs after {what}: "
            + ", ".join(f"`{name}` {row.get(name)!r} instead of {want.get(name)!r}" for name in different[:3])
            + "; what the method keeps between windows belongs in `state_dict`",
        )
    last, want_last = (CheckpointManager(path / "checkpoints").load_latest() for path in (found, expected))
    assert last is not None and want_last is not None  # a run saves at its end
    for group in ("model", "optimizer"):
        tensors, want_tensors = last.tensors(group), want_last.tensors(group)
        different = [name for name in want_tensors if not torch.equal(tensors[name], want_tensors[name])]
        require(not different, f"the resumed run ends with another {group}: {', '.join(different[:4])}")
    for rank, (own, want_own) in enumerate(zip(last.state["ranks"], want_last.state["ranks"], strict=True)):
        different = [name for name in want_own if own[name] != want_own[name]]
        require(not different, f"process {rank} ends with another state after {what}: {', '.join(different)}")
