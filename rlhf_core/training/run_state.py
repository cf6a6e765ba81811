"""Everything of a run that changes with its steps, gathered into a checkpoint and restored."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.errors import DataError, ModelError, PluginError
from rlhf_core.infra.seeds import RandomState
from rlhf_core.training.checkpoint import (
    Checkpoint,
    CheckpointManager,
    Damaged,
    load_optimizer_state,
    optimizer_state,
)
from rlhf_core.training.run_state_schema import check_state

if TYPE_CHECKING:
    from rlhf_core.training.loop import Run

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """The run's counters."""

    step: int = 0
    """Optimiser steps taken."""
    tokens: int = 0
    """Real tokens trained on, each prompt counted once."""
    seconds: float = 0.0
    """Time spent in steps."""
    skipped: int = 0
    """Windows that held nothing to learn from."""
    batches: int = 0
    """Batches of data that this process had taken when the last step was made; each process saves its own."""
    evaluated: int | None = None
    """The step of the last evaluation."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The last step's row."""
    eval_metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the counters that all processes share, as JSON values; a metric that isn't finite is its name as text."""
        metrics = {"metrics": _encoded(self.metrics), "eval_metrics": _encoded(self.eval_metrics)}
        return {name: value for name, value in asdict(self).items() if name != "batches"} | metrics

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """Return what `to_json` described."""
        metrics = {"metrics": _decoded(values["metrics"]), "eval_metrics": _decoded(values["eval_metrics"])}
        return cls(**{**values, **metrics})


def _encoded(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def _decoded(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(value) if isinstance(value, str) else value for name, value in metrics.items()}


class RunState:
    """Saves and restores one run: models, optimiser, stream, counters, random states, and what the method remembers."""

    def __init__(self, run: Run) -> None:
        self._run = run
        output = run.trainer.output
        self._manager = CheckpointManager(output / "checkpoints", run.config.checkpoint.keep) if output else None
        self.saved_step = 0
        self.logged: dict[str, tuple[float, float]] = {}
        """What the method had logged for the next step's row when the checkpoint was saved that the run continues from."""

    def damaged(self) -> list[Damaged]:
        """Return the checkpoints that the last load refused."""
        return self._manager.damaged if self._manager is not None else []

    def save(self) -> Path:
        """Save the state after the current step; every process takes part, the first one writes."""
        run, manager = self._run, self._manager
        assert manager is not None
        step = run.progress.step
        optimizer, values = optimizer_state(run.optimizer, run.parameters)
        own: dict[str, Any] = {"random": RandomState.capture().to_json(), "trainer": self._remembered()}
        own |= {"stream": run.stream.state_dict(), "batches": run.progress.batches}
        # Of rollouts that made no step: the next step's row reports them.
        own["logged"] = {name: list(map(repr, pair)) for name, pair in run.context.pending().items()}
        ranks = run.distribution.gather(own)
        state: dict[str, Any] = {
            "progress": run.progress.to_json(),
            "total_steps": run.total_steps,
            "inside_rollout": run.inside_rollout,
            "eval_fingerprint": run.eval_dataset.fingerprint if run.eval_dataset is not None else None,
            "micro_batches": run.micro_batches.state_dict(),
            "loss_scale": run.loss_scale.state_dict(),
            "early_stopping": run.early_stopping.state_dict() if run.early_stopping is not None else None,
            "optimizer": values,
            "ranks": ranks,
        }
        tensors = {"model": run.distribution.full_state(run.trainer.models), "optimizer": optimizer}
        self._protect(state["early_stopping"])
        run.distribution.on_main(lambda: manager.save(step, tensors, state) and None)
        self.saved_step = step
        return manager.path(step)

    def find(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, for `put_back`; None where the run has none yet."""
        run, manager = self._run, self._manager
        assert manager is not None
        found: list[Checkpoint | None] = []

        def check(state: Any) -> None:
            check_state(run, state)
            self._protect(state["early_stopping"])

        def verify() -> int | None:
            found.append(manager.load_latest(check))
            return found[0].step if found[0] is not None else None

        step = run.distribution.on_main(verify)
        if step is None:
            return None
        return found[0] if found else manager.open(step)

    def _protect(self, early_stopping: Mapping[str, Any] | None) -> None:
        """Keep the best checkpoint from being pruned, where it is to be kept."""
        config = self._run.config.early_stopping
        if self._manager is not None and config is not None and config.keep_best and early_stopping is not None:
            self._manager.protected = early_stopping["best_step"]

    def take_best(self, step: int) -> bool:
        """Give the models the weights that they had at a step, where its checkpoint is kept and whole."""
        run, manager = self._run, self._manager
        if manager is None:
            return False

        def verify() -> bool:
            if step not in manager.steps():
                return False
            try:
                return bool(manager.verified(step))
            except ModelError as error:
                log.warning("%s", error)
                return False

        if not run.distribution.on_main(verify):
            return False
        checkpoint = manager.open(step)
        run.distribution.load_state(run.trainer.models, checkpoint.tensors("model"), place=str(checkpoint.path))
        return True

    def _remembered(self) -> dict[str, Any]:
        """Return the method's own state, checked to be JSON."""
        state = self._run.trainer.state_dict()
        place = f"{type(self._run.trainer).__name__}.state_dict"
        try:
            same = json.loads(json.dumps(state, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise PluginError("the state can't be saved as JSON", place=place, got=error) from None
        return same

    def put_back(self, checkpoint: Checkpoint) -> None:
        """Let the run go on from this checkpoint.

        Raises:
            DataError: other rows are trained on or held out than when it was saved.
            ModelError: it doesn't fit the models.
        """
        run, state, place = self._run, checkpoint.state, str(checkpoint.path)
        self._check_held_out(state["eval_fingerprint"])
        run.distribution.load_state(run.trainer.models, checkpoint.tensors("model"), place=place)
        load_optimizer_state(
            run.optimizer, run.parameters, checkpoint.tensors("optimizer"), state["optimizer"], place=place
        )
        run.progress = Progress.from_json(state["progress"])
        run.micro_batches.load_state_dict(state["micro_batches"])
        run.loss_scale.load_state_dict(state["loss_scale"])
        if run.early_stopping is not None:
            if state["early_stopping"] is None:
                raise ModelError("the checkpoint has no state of early stopping", place=place)
            run.early_stopping.load_state_dict(state["early_stopping"])
        ranks, rank = state["ranks"], run.distribution.rank
        reached = _place_in_data(ranks, rank, run.distribution.world_size)
        run.stream.load_state_dict(reached["stream"])
        run.progress.batches = reached["batches"]
        if len(ranks) == run.distribution.world_size:
            RandomState.from_json(ranks[rank]["random"]).restore()
            self.logged = {name: (float(pair[0]), float(pair[1])) for name, pair in ranks[rank]["logged"].items()}
        else:
            log.warning(
                "resumed with %d processes after %d: the data go on where they were, rounding and random draws will differ",
                run.distribution.world_size,
                len(ranks),
            )
        run.trainer.load_state_dict(ranks[min(rank, len(ranks) - 1)]["trainer"])
        self.saved_step = checkpoint.step
        log.info("resumed from %s", checkpoint.path)
        if state["inside_rollout"] and (run.total_steps is None or run.progress.step < run.total_steps):
            raise ModelError("the checkpoint is inside a rollout, which no run can go on with", place=place)
        if run.total_steps is not None and run.progress.step >= run.total_steps:
            log.info("all of its %d steps were done already: there is nothing left to train", run.progress.step)

    def _check_held_out(self, saved: str | None) -> None:
        """Refuse other held-out rows: what is evaluated before and after a resume must be comparable."""
        dataset = self._run.eval_dataset
        now = dataset.fingerprint if dataset is not None else None
        if now != saved:
            raise DataError(
                "the held-out rows, the tokenizer, or how rows are read changed since the checkpoint",
                place="eval_data",
                got=f"fingerprint {(now or 'none')[:12]}, saved {(saved or 'none')[:12]}",
                fix="resume with what the run was started with, or start a new run",
            )


def _place_in_data(ranks: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> Mapping[str, Any]:
    """Return whose place in the data a process continues from: its own, or with another number of processes the furthest."""
    if len(ranks) == world_size:
        return ranks[rank]
    furthest = max(ranks, key=lambda entry: entry["stream"]["rows"])
    if any(entry["stream"]["rows"] != furthest["stream"]["rows"] for entry in ranks):
        log.warning("some processes had taken fewer batches than others: their shares of the last ones are left out")
    return furthest
