"""The life of one run: set up, restored, trained, finished; however it ends, its record says how."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rlhf_core.contracts.result import TrainResult
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data.chat_rendering import rendered_at
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError, Stopped
from rlhf_core.infra.files import readable_size
from rlhf_core.infra.seeds import seed_everything
from rlhf_core.registry.hooks import Hooks, load_hooks
from rlhf_core.training.checkpoint import CheckpointManager
from rlhf_core.training.context import RunContext
from rlhf_core.training.disk_space import checkpoint_bytes_on_disk, disk_need
from rlhf_core.training.distribution import Distribution, create_distribution
from rlhf_core.training.early_stopping import KLBudget
from rlhf_core.training.engine_gap import FirstGap
from rlhf_core.training.evaluation_schedule import EvaluationSchedule
from rlhf_core.training.export import export_models
from rlhf_core.training.fixed_prompts import FixedPrompts
from rlhf_core.training.hub_push import HubPush
from rlhf_core.training.logger import TrainingLogger
from rlhf_core.training.loop import TrainingLoop
from rlhf_core.training.loss_scale import LossScale
from rlhf_core.training.optimizer import Schedule, warn_of_rate_for_every_weight
from rlhf_core.training.resume_changes import OptionChange, check_changes
from rlhf_core.training.run_card import run_card
from rlhf_core.training.run_data import open_stream
from rlhf_core.training.run_directory import RunDirectory, refuse_inputs_inside
from rlhf_core.training.run_record import (
    check_inputs,
    method_origin,
    record_data,
    record_failure,
    record_inputs,
    resolved_options,
    share_choices,
)
from rlhf_core.training.run_state import RunProgress, RunState
from rlhf_core.training.setup import RunSetup
from rlhf_core.training.signals import StopNow, StopSignal, stopped

log = logging.getLogger(__name__)


def run(
    trainer: Trainer,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_change: Sequence[str] = (),
    quiet: bool = False,
) -> TrainResult:
    """Train to the end and return the result. `Trainer.train` calls this, shows the log, and describes the other arguments.

    Args:
        quiet: show no progress bar.

    Raises:
        RLHFError: a fault that the user can mend; the run directory's `run.json` says the same.
        Stopped: SIGTERM or Ctrl-C came; the state is saved.
        KeyboardInterrupt: Ctrl-C came where nothing could be saved, or twice.
    """
    if allow_change and not resume:
        raise ConfigError(
            "options of a run change where it is resumed", place="--allow-change", got=", ".join(allow_change),
            fix="add `--resume`, or leave it out: a new run has any options",
        )  # fmt: skip
    return Run(trainer, resume=resume, overwrite=overwrite, allow_change=allow_change, quiet=quiet).execute()


class Run:
    """One run of one trainer in this process. Its parts share it: the loop, the evaluations, the state, the record."""

    stop: StopSignal
    distribution: Distribution
    setup: RunSetup
    directory: RunDirectory
    logger: TrainingLogger
    hooks: Hooks
    state: RunState

    def __init__(
        self,
        trainer: Trainer,
        *,
        resume: bool,
        overwrite: bool,
        allow_change: Sequence[str] = (),
        quiet: bool = False,
    ) -> None:
        self.trainer, self.quiet = trainer, quiet
        self.explicit_options = trainer.config.model_dump(mode="json", exclude_unset=True)
        """The options that were set in Python, without defaults."""
        self.resume, self.overwrite, self.allow_change = resume, overwrite, allow_change
        self.changes: list[OptionChange] = []
        """What differs from the options that the run was started with, where it is resumed."""
        self.options = resolved_options(trainer)
        """Every option of the run as `config.yaml` holds it."""
        self.progress = RunProgress()
        self.recorded = False
        """Whether the run directory says what the run is made from, as this process was asked for it."""
        self.started = False
        """Whether the log is open and, of a resumed run, the checkpoint restored."""
        self.inside_rollout = False
        """Whether the last window wasn't its rollout's last; a run can't be resumed from there."""
        self.saved_at = time.monotonic()
        """When the last checkpoint was saved, or the training began."""

    def execute(self) -> TrainResult:
        """Set up, train and finish; however that ends, write it into the run's record."""
        with StopSignal(speak=int(os.environ.get("RANK", "0")) == 0) as self.stop:
            with self.stop.at_once(signal.SIGINT):
                devices = DeviceManager()
                self.distribution = create_distribution(self.trainer.config.distributed, devices)
                self.setup = RunSetup(self.trainer, self.distribution, devices)
            self.directory = self._open_directory()
            try:
                with rendered_at(self.directory.record["started"]):
                    # With several processes only what reaches them all, as Ctrl-C does, may end one of them here.
                    alone = self.distribution.world_size == 1
                    with self.stop.at_once(*([signal.SIGTERM] if alone else []), signal.SIGINT):
                        self._set_up()
                    # Without a directory there is nothing that finishing the step would save.
                    with self.stop.at_once(signal.SIGINT) if self.trainer.output is None else contextlib.nullcontext():
                        self._begin()
                        TrainingLoop(self).train()
                        return self._finish()
            except BaseException as raised:
                error = self._reported_as(raised)
                record_failure(self, error)
                if error is raised:
                    raise
                raise error from None
            finally:
                if self.started:
                    self.logger.close()
                self.directory.close()

    # Before the first step

    def _open_directory(self) -> RunDirectory:
        """Open the run directory on the first process; the others learn whether it continues a run."""
        opened: list[RunDirectory] = []

        def open_here() -> dict[str, Any]:
            if not self.resume and self.trainer.output is not None:
                refuse_inputs_inside(self.trainer.output, self.options)
            asked = {"plugin": method_origin(self.trainer), "model": self.options["model"]}
            how = {"resume": self.resume, "overwrite": self.overwrite}
            opened.append(RunDirectory.open(self.trainer.output, asked=asked, **how))
            return {"continued": opened[0].continued, "started": opened[0].record["started"]}

        main = self.distribution.on_main(open_here)
        return opened[0] if opened else RunDirectory(None, {"started": main["started"]}, continued=main["continued"])

    def _set_up(self) -> None:
        """Build, open, check and restore everything that the first step needs."""
        setup, config = self.setup, self.trainer.config
        self._check_resumable()
        self.push = HubPush.checked(self.trainer, self.distribution)
        share_choices(self)
        setup.build_models()
        if setup.config is not config:  # the model has decided `max_length`
            self.options = resolved_options(self.trainer)
            self._check_resumable()
        setup.open_data()
        inputs = check_inputs(self)
        self.state = RunState(self)
        self.checkpoint = self.state.find() if self.directory.continued else None
        record_inputs(self, inputs, self.checkpoint.step if self.checkpoint is not None else 0)
        setup.load_rewards()
        setup.inspect_data()
        setup.share_parameters()
        setup.precompute_reference()
        saved = self.checkpoint.state if self.checkpoint is not None else None
        self.stream, self.total_steps = open_stream(
            self.trainer, setup.dataset, distribution=self.distribution, saved=saved
        )
        # Where the data decide how many steps there are, the schedule counts batches of data.
        self.schedule = Schedule.create(
            setup.config, self.stream.steps if self.total_steps is None else self.total_steps
        )
        self._require_disk_space()
        self.optimizer = setup.make_optimizer()
        if not self.directory.continued:
            warn_of_rate_for_every_weight(setup.parameters, setup.config, setup.loader.factors)
        self.loss_scale = LossScale(enabled=setup.config.precision == "fp16")
        self.evaluations = EvaluationSchedule(self)
        self.kl_budget = KLBudget.create(setup.config)
        self.fixed_prompts = FixedPrompts(self)
        seed_everything(setup.config.seed, "training", self.distribution.rank)
        if self.checkpoint is not None:
            self.state.restore(self.checkpoint)
        self._open_log()
        self.context = setup.make_context(
            RunContext,
            clock=lambda: self.progress.step,
            notify=self.hooks.emit,
            keep=self.logger.samples.scored,
            phases=self.logger.phases,
            replay=setup.replay,
            first_rollout=FirstGap(setup.config, self.logger.event),
        )
        for name, pair in self.state.logged.items():
            self.context.log(name, *pair)
        self.updater = setup.make_updater(self.optimizer, self.loss_scale, self.logger.event)

    def _check_resumable(self) -> None:
        """Refuse to continue a run under options that would change what it computes."""

        def changes() -> list[dict[str, Any]]:
            before, output = self.directory.options() if self.directory.continued else None, self.trainer.output
            if not before or output is None:
                return []
            done = max(CheckpointManager(output / "checkpoints").steps(), default=0)
            found = check_changes(before, self.options, place=str(output), allowed=self.allow_change, steps_done=done)
            return [asdict(change) for change in found]

        self.changes = [OptionChange(**change) for change in self.distribution.on_main(changes)]

    def _require_disk_space(self) -> None:
        """Refuse to begin if the disk has less free space than the run will write."""
        output = self.trainer.output
        if output is None:
            return

        def require() -> None:
            need = disk_need(self.setup, self.total_steps)
            free = need.require(output, already_there=checkpoint_bytes_on_disk(output))
            log.info("the run writes at most %s; %s are free", need, readable_size(free))

        self.distribution.on_main(require)

    def _open_log(self) -> None:
        """Load the hooks and open the log, cut back to the checkpoint of a resumed run; log how the run begins."""
        # Hooks write files and call trackers: on one process, whatever the number of processes.
        self.hooks = load_hooks() if self.distribution.is_main else Hooks()
        if self.distribution.is_main:
            self.hooks.add_callbacks(self.trainer.callbacks)
        output, step = self.trainer.output, self.progress.step
        self.logger = TrainingLogger(
            output,
            self.setup.config.logging,
            total_steps=self.total_steps,
            step=step,
            enabled=self.distribution.is_main,
            quiet=self.quiet,
            options=self.options,
        )
        self.started = True
        progress = self.progress
        self.logger.resume(
            step,
            evaluated=progress.evaluated,
            sampled=progress.sampled,
            last_row=progress.metrics,
            place=self.stream.rows,
        )
        for item in self.state.damaged():
            self.logger.event("checkpoint_damaged", step=item.step, path=item.path.name, reason=item.reason)
        if self.directory.continued:
            if self.checkpoint is None:
                log.warning("%s holds no checkpoint yet: starting at step 0", output)
            self.logger.event(
                "run_resumed", step=step, changed=list(map(str, self.changes)), total_steps=self.total_steps
            )
            self._report_changes()
            if self.stopped_early:
                self._warn_of_early_stop()
        else:
            if self.resume:
                log.warning("%s holds no run to resume: starting one at step 0", output)
            self.logger.event("run_started", total_steps=self.total_steps)

    def _warn_of_early_stop(self) -> None:
        """Warn that a resumed run was ended early, and so makes no further step, and say what would let it."""
        by_patience = self.evaluations.stopped_early
        mend = (
            "a larger `early_stopping.patience`, allowed by `--allow-change early_stopping.patience`,"
            if by_patience
            else "a larger `kl_budget`"
        )
        log.warning(
            "the run was stopped early, and makes no further step: %s; %s lets it go on", self._stopped_because(), mend
        )

    def _report_changes(self) -> None:
        """Log from which step on which options are others, and how that changes the learning rate."""
        step = self.progress.step
        for change in self.changes:
            log.info("changed from step %d on: %s", step + 1, change)
        before = self.progress.metrics.get("learning_rate")
        going_on = self.total_steps is not None and step < self.total_steps and not self.stopped_early
        if self.changes and before is not None and going_on:
            now = self.schedule(step + 1 + (self.progress.skipped if self.setup.config.max_steps is None else 0))
            if now != before:
                log.info("the learning rate was %.3g at step %d, and is %.3g at step %d", before, step, now, step + 1)

    def _begin(self) -> None:
        """Emit `run_started`, and mark that training changes the models from here on."""
        self.hooks.emit("run_started", run=self.trainer)
        self.first_step = self.progress.step
        self.saved_at = time.monotonic()
        for module in self.trainer.models.modules():
            if getattr(module, "fresh_adapter", False):
                # After the first step an adapter that is off no longer gives what was passed in, if this model is trained again.
                module.fresh_adapter = False  # type: ignore[assignment]

    # While it trains

    def save(self) -> None:
        """Save a checkpoint of the current step, unless it is saved already or there is no directory."""
        if self.trainer.output is None or self.progress.step == self.state.saved_step or not self.progress.step:
            return
        self.logger.flush()
        path = self.state.save()
        self.directory.update(step=self.progress.step)
        self.logger.event("checkpoint_saved", step=self.progress.step, path=path.name)
        self.hooks.emit("checkpoint_saved", run=self.trainer, step=self.progress.step, path=path)
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Stop at once, not after the step, when asked to within this context: nothing is trained here that could be lost.

        The state is saved first. Several processes finish what is inside, where they wait for each other.
        """
        if self.distribution.world_size > 1:
            yield
            return
        try:
            with self.stop.at_once():
                yield
        except StopNow:
            self.save()
            if self.state.saved_step != self.progress.step or not self.progress.step:
                raise
            raise self.stopped() from None

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping or the KL budget has ended the run."""
        return self.evaluations.stopped_early or self.kl_budget.spent

    def _stopped_because(self) -> str | None:
        """Return why the run was ended early; None where it wasn't."""
        stopping = self.evaluations.early_stopping
        if stopping is not None and stopping.stopped:
            return stopping.why()
        return self.kl_budget.why() if self.kl_budget.spent else None

    def stopped(self) -> Stopped:
        """Return the error with which a run ends that was asked to stop."""
        resuming = self.directory.continued and not self.started
        error = stopped(self.progress.step, self.trainer.output, resuming=resuming)
        error.silent = not self.distribution.is_main
        return error

    # The end

    def _finish(self) -> TrainResult:
        """Evaluate, complete the fixed prompts, save, export the trained models, write how it ended, return the result."""
        progress, evaluations, best = self.progress, self.evaluations, self.evaluations.watched
        evaluations.finish()
        self.fixed_prompts.finish()
        self.save()
        record_data(self)
        if steps := progress.step - self.first_step:
            for role in sorted(self.updater.untouched):
                log.warning("`%s` is trained, and got no gradient in %d steps: it is exported as it was", role, steps)
        model_step = evaluations.restore_best()
        if best is not None and best.never_improved:
            log.warning(
                "no evaluation was better than the one before the first step: `%s` was %g there, and %g at its best",
                best.metric,
                best.start,
                best.best,
            )
        with self.stopping_at_once():
            card = partial(run_card, self, model_step=model_step)
            model_dir = export_models(self.trainer, self.distribution, card)
        result = TrainResult(
            step=progress.step,
            metrics=progress.metrics,
            eval_metrics=progress.eval_metrics,
            output=self.trainer.output,
            model_dir=model_dir,
            seconds=progress.seconds,
            tokens=progress.tokens,
            stopped_early=self.stopped_early,
            stopped_because=self._stopped_because(),
            best_step=best.best_step if best is not None else None,
            best_metric=best.metric if best is not None else None,
            best_value=best.best if best is not None else None,
            model_step=model_step,
        )
        self.directory.record |= {
            "peak_memory_bytes": self.setup.devices.peak_memory(),
            "skipped_windows": progress.skipped,
            "stopped_because": result.stopped_because,
            "best_step": result.best_step,
            "best_metric": result.best_metric,
            "best_value": result.best_value,
            "model_step": model_step,
        }
        self.directory.end("done", 0, step=progress.step)
        if self.push is not None:  # whether it succeeds is no part of how the run ended
            pushed, push_error = self.push.push(model_dir, step=progress.step)
            result = replace(result, pushed=pushed, push_error=push_error)
            self.directory.update(pushed=pushed, push_error=push_error)
        self.logger.event(
            "run_ended", step=progress.step, stopped_early=result.stopped_early, because=result.stopped_because,
            model_step=model_step,
        )  # fmt: skip
        self.hooks.emit("run_ended", run=self.trainer, result=result)
        return result

    def _reported_as(self, error: BaseException) -> BaseException:
        """Return the error that the run ends with, given the one that was raised.

        A SIGTERM that was met where nothing could be saved ends as `Stopped`, Ctrl-C with a note of what can be resumed, and a
        collective operation that failed because another process is gone as `LostProcess`.
        """
        if isinstance(error, StopNow) and self.stop.requested == signal.SIGTERM:
            return self.stopped()
        if isinstance(error, KeyboardInterrupt):
            error.add_note(self._resumable_from())
        if (lost := self.distribution.lost(error)) is not None:
            saved = self.state.saved_step if hasattr(self, "state") else 0
            origin = f", from the checkpoint of step {saved}" if saved else ", from the beginning"
            lost.fix = f"start all processes again with `--resume`{origin}"
            # The process that ended has reported why, or another has reported that it ended.
            lost.silent = lost.silent or self.directory.fault_recorded(self.trainer.output)
            lost.__cause__ = error
            return lost
        return error

    def _resumable_from(self) -> str:
        """Return when an interrupted run ended, and the checkpoint from which it can be resumed."""
        step = self.progress.step
        if self.directory.continued and not self.started:
            return "before it had resumed: its checkpoints are as they were"
        if not (self.started and step):
            return "before its first step"
        if self.state.saved_step:
            return f"after step {step}: `--resume` continues from the checkpoint of step {self.state.saved_step}"
        return f"after step {step}, with no checkpoint to continue from"
