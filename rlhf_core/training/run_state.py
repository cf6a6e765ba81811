"""The state of a run, everything that changes with its steps: gathered into a checkpoint, restored from one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.errors import DataError, ModelError, PluginError
from rlhf_core.infra.seeds import RandomState
from rlhf_core.training.checkpoint import Checkpoint, CheckpointManager, DamagedCheckpoint
from rlhf_core.training.earlier_evaluations import earlier_evaluations
from rlhf_core.training.early_stopping import exported_evaluation_of
from rlhf_core.training.optimizer import load_optimizer_state, optimizer_state
from rlhf_core.training.run_data import fits_plan, run_plan
from rlhf_core.training.run_state_schema import check_state, metrics_as_text, metrics_from_text

if TYPE_CHECKING:
    from rlhf_core.training.run import Run

log = logging.getLogger(__name__)


@dataclass
class RunProgress:
    """The run's counters."""

    step: int = 0
    """Optimiser steps made."""
    tokens: int = 0
    """Real tokens trained on, each prompt counted once."""
    seconds: float = 0.0
    """Time spent in steps."""
    skipped: int = 0
    """Windows that made no step, because every weight in them was zero."""
    alike: int = 0
    """Rollouts in a row, the last one included, whose rewards taught nothing."""
    batches: int = 0
    """Batches of data that this process had taken when the last step was made; each process saves its own."""
    evaluated: int | None = None
    """The step of the last evaluation."""
    sampled: int | None = None
    """The last step at which the fixed prompts were completed."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The last step's row."""
    eval_metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of the last evaluation."""

    def to_json(self) -> dict[str, Any]:
        """Return the counters that all processes share, as JSON values; a metric that isn't finite is its name as text."""
        metrics = {"metrics": metrics_as_text(self.metrics), "eval_metrics": metrics_as_text(self.eval_metrics)}
        return {name: value for name, value in asdict(self).items() if name != "batches"} | metrics

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunProgress:
        """Return the counters that `to_json` described."""
        metrics = {
            "metrics": metrics_from_text(values["metrics"]),
            "eval_metrics": metrics_from_text(values["eval_metrics"]),
        }
        return cls(**{**values, **metrics})


class RunState:
    """Saves and restores one run: models, optimiser, stream, counters, random states, and the method's `state_dict`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        output, keep = run.trainer.output, run.setup.config.checkpoint.keep
        self._manager = CheckpointManager(output / "checkpoints", keep) if output else None
        self.saved_step = 0
        """The step of the checkpoint that was saved or restored last."""
        self.logged: dict[str, tuple[float, float]] = {}
        """(sum, count) by name of what the method had logged for the next step's row, in the checkpoint that was restored."""

    def damaged(self) -> list[DamagedCheckpoint]:
        """Return the checkpoints that the last load refused."""
        return self._manager.damaged if self._manager is not None else []

    def save(self) -> Path:
        """Save the state after the current step, return its directory; every process takes part, the first one writes."""
        run, setup, manager = self._run, self._run.setup, self._manager
        assert manager is not None
        step, stopping, best = run.progress.step, run.evaluations.early_stopping, run.evaluations.keep_best
        optimizer, values = optimizer_state(run.optimizer, setup.parameters)
        own: dict[str, Any] = {"random": RandomState.capture().to_json(), "trainer": self._method_state()}
        own |= {"stream": run.stream.state_dict(), "batches": run.progress.batches}
        # Logged by rollouts that made no step: the next step's row reports it.
        own["logged"] = {name: list(map(repr, pair)) for name, pair in run.context.pending().items()}
        ranks = run.distribution.gather(own)
        state: dict[str, Any] = {
            "progress": run.progress.to_json(),
            "total_steps": run.total_steps,
            "plan": run_plan(run.trainer),
            "inside_rollout": run.inside_rollout,
            "eval_fingerprint": setup.eval_dataset.fingerprint if setup.eval_dataset is not None else None,
            "micro_batches": setup.micro_batches.state_dict(),
            "loss_scale": run.loss_scale.state_dict(),
            "early_stopping": stopping.state_dict() if stopping is not None else None,
            "keep_best": best.state_dict() if best is not None else None,
            "kl_budget": run.kl_budget.state_dict(),
            "optimizer": values,
            "ranks": ranks,
        }
        tensors = {"model": run.distribution.full_state(run.trainer.models), "optimizer": optimizer}
        self._protect_best(state)
        run.distribution.on_main(lambda: manager.save(step, tensors, state) and None)
        self.saved_step = step
        return manager.path(step)

    def find(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, for `restore`; None where the run has none yet."""
        run, manager = self._run, self._manager
        assert manager is not None
        found: list[Checkpoint | None] = []

        def check(state: Any) -> None:
            check_state(state, run.setup.dataset)
            self._recall_best(state)
            self._protect_best(state)

        def verify() -> int | None:
            found.append(manager.load_latest(check, fits=lambda state: fits_plan(run.trainer, state)))
            return found[0].step if found[0] is not None else None

        step = run.distribution.on_main(verify)
        if step is None:
            return None
        checkpoint = (found[0] if found else None) or manager.open(step)
        self._recall_best(checkpoint.state)
        return checkpoint

    def _recall_best(self, state: dict[str, Any]) -> None:
        """Let the run's earlier evaluations count where the resume has another metric find the best checkpoint, or the first one.

        What they say of it takes the place of what the state says of another metric, before older checkpoints are pruned.
        """
        config, output, manager = self._run.setup.config, self._run.trainer.output, self._manager
        watched = exported_evaluation_of(config)
        if watched is None or output is None or manager is None:
            return
        saved = state.get(watched.option)
        if saved is None or not watched.is_of(saved):
            evaluated = state["progress"]["evaluated"]
            made = {} if evaluated is None else earlier_evaluations(output, evaluated)
            watched.recall(made, manager.steps())
            state[watched.option] = watched.state_dict()

    def _protect_best(self, state: Mapping[str, Any]) -> None:
        """Keep the checkpoint with the best metric from being pruned, where it is the one that is exported."""
        config = self._run.setup.config
        saved = state.get("keep_best" if config.keep_best is not None else "early_stopping")
        if self._manager is not None and config.exported_by is not None and saved is not None:
            self._manager.protected = saved["best_step"]

    def restore_model(self, step: int) -> bool:
        """Load the weights of a step into the models; return False, with nothing changed, where its checkpoint isn't whole."""
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

    def _method_state(self) -> dict[str, Any]:
        """Return the method's `state_dict`, checked to be JSON values."""
        state = self._run.trainer.state_dict()
        place = f"{type(self._run.trainer).__name__}.state_dict"
        try:
            same = json.loads(json.dumps(state, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise PluginError("the state can't be saved as JSON", place=place, got=error) from None
        return same

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from this checkpoint: restore everything that `save` saved.

        Raises:
            DataError: other rows are trained on or held out than when it was saved.
            ModelError: it doesn't fit the models.
        """
        run, setup, state, place = self._run, self._run.setup, checkpoint.state, str(checkpoint.path)
        self._check_held_out(state["eval_fingerprint"])
        run.distribution.load_state(run.trainer.models, checkpoint.tensors("model"), place=place)
        tensors = checkpoint.tensors("optimizer")
        load_optimizer_state(run.optimizer, setup.parameters, tensors, state["optimizer"], place=place)
        run.progress = RunProgress.from_json(state["progress"])
        setup.micro_batches.load_state_dict(state["micro_batches"])
        run.loss_scale.load_state_dict(state["loss_scale"])
        for name in ("early_stopping", "keep_best"):
            watched, saved = getattr(run.evaluations, name), state.get(name)
            if watched is not None and saved is not None:  # else the resume has added the option
                watched.load_state_dict(saved)
                if watched.lost is not None:
                    left = f"of those that are left, step {watched.best_step} was best: {watched.best:.6g}"
                    left = "the best from here on is kept" if watched.best is None else left
                    log.warning("`%s`: %s; %s", watched.metric, watched.describe_lost(), left)
        run.kl_budget.load_state_dict(state["kl_budget"])
        ranks, rank = state["ranks"], run.distribution.rank
        reached = _state_of_data(ranks, rank, run.distribution.world_size)
        run.stream.load_state_dict(reached["stream"])
        run.progress.batches = reached["batches"]
        if len(ranks) == run.distribution.world_size:
            RandomState.from_json(ranks[rank]["random"]).restore()
            self.logged = {name: (float(pair[0]), float(pair[1])) for name, pair in ranks[rank]["logged"].items()}
        else:
            log.warning(
                "resumed with %d processes, saved with %d: the data continue where they were; rounding and random draws differ",
                run.distribution.world_size,
                len(ranks),
            )
        run.trainer.load_state_dict(ranks[min(rank, len(ranks) - 1)]["trainer"])
        self.saved_step = checkpoint.step
        log.info("resumed from %s", checkpoint.path)
        if state["inside_rollout"] and (run.total_steps is None or run.progress.step < run.total_steps):
            raise ModelError("the checkpoint is inside a rollout, from where no run can continue", place=place)
        if run.total_steps is not None and run.progress.step >= run.total_steps:
            log.info("all of its %d steps were done already: there is nothing left to train", run.progress.step)

    def _check_held_out(self, saved: str | None) -> None:
        """Refuse other held-out rows: evaluations before and after a resume must be comparable."""
        dataset = self._run.setup.eval_dataset
        now = dataset.fingerprint if dataset is not None else None
        if now != saved:
            raise DataError(
                "the held-out rows, the tokenizer, or how rows are read changed since the checkpoint",
                place="eval_data",
                got=f"fingerprint {(now or 'none')[:12]}, saved {(saved or 'none')[:12]}",
                fix="resume with what the run was started with, or start a new run",
            )


def _state_of_data(ranks: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> Mapping[str, Any]:
    """Return the saved entry, of one per process, whose position in the data this process continues from.

    It is the process's own; where their number has changed, that of the process that had read furthest.
    """
    if len(ranks) == world_size:
        return ranks[rank]
    furthest = max(ranks, key=lambda entry: entry["stream"]["rows"])
    if any(entry["stream"]["rows"] != furthest["stream"]["rows"] for entry in ranks):
        log.warning("some processes had taken fewer batches than others: their shares of the last ones are left out")
    return furthest
