"""The one loop that every method trains in: windows of experience, one update each, evaluation, checkpoints, an end.

Everything that decides what is learned is a function of the configuration and the state in the checkpoint, so a run that is
killed and resumed makes the same updates as one that never was.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rlhf_core.contracts.result import TrainResult
from rlhf_core.contracts.trainer import Trainer, Window
from rlhf_core.data.sources import check_paths
from rlhf_core.data.templates import rendered_at
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import NumbersError, PluginError, Stopped
from rlhf_core.infra.out_of_memory import try_to_fit
from rlhf_core.infra.seeds import seed_everything
from rlhf_core.registry.hooks import Hooks, load_hooks
from rlhf_core.training.context import RunContext
from rlhf_core.training.disk_space import need_of_run, room_taken
from rlhf_core.training.distribution import Distribution, create_distribution
from rlhf_core.training.early_stopping import EarlyStopping
from rlhf_core.training.export import export_models
from rlhf_core.training.held_out import evaluate
from rlhf_core.training.loader import Loader
from rlhf_core.training.logger import REQUIRED, TIMING, TrainingLogger
from rlhf_core.training.loss_scale import LossScale
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.optimizer import Schedule, create_optimizer, set_learning_rate
from rlhf_core.training.reduction import quotients
from rlhf_core.training.run_data import keep_texts, open_data, open_stream
from rlhf_core.training.run_directory import RunDirectory
from rlhf_core.training.run_record import check_unchanged, note_data, note_failure, note_inputs, run_settings
from rlhf_core.training.run_state import Progress, RunState
from rlhf_core.training.setup import (
    build_models,
    check_config,
    precompute_reference,
    prepare_rewards,
    training_mode,
)
from rlhf_core.training.signals import StopNow, StopSignal, stopped
from rlhf_core.training.update import Outcome, Update, sum_pairs
from rlhf_core.training.windows import Windows

log = logging.getLogger(__name__)


def run(trainer: Trainer, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Train to the end and return the result. `Trainer.train` is the way in.

    Raises:
        RLHFError: a fault that the user can mend; the run directory's `run.json` says the same.
        Stopped: SIGTERM or Ctrl-C came; the state is saved.
        KeyboardInterrupt: Ctrl-C came where nothing could be saved, or twice.
    """
    return Run(trainer, resume=resume, overwrite=overwrite).execute()


class Run:
    """One run of one trainer in this process."""

    distribution: Distribution
    directory: RunDirectory
    logger: TrainingLogger
    hooks: Hooks
    state: RunState

    def __init__(self, trainer: Trainer, *, resume: bool, overwrite: bool) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.explicit = trainer.config.model_dump(mode="json", exclude_unset=True)
        """The options that were set."""
        self.resume, self.overwrite = resume, overwrite
        self.settings = run_settings(trainer)
        self.progress = Progress()
        self.started = False
        self.inside_rollout = False
        """Whether the last window wasn't its rollout's last, so that no run can go on from here."""
        self.saved_at = time.monotonic()

    def execute(self) -> TrainResult:
        """Prepare, train, finish; however it ends, the run's record says so."""
        with StopSignal(speak=int(os.environ.get("RANK", "0")) == 0) as self.stop:
            with self.stop.at_once(signal.SIGINT):
                self.devices = DeviceManager()
                self.distribution = create_distribution(self.config.distributed, self.devices)
                check_config(self.trainer, self.distribution, self.devices)
                self.rewards = prepare_rewards(self.trainer)
            self.directory = self._open_directory()
            try:
                with rendered_at(self.directory.record["started"]):
                    with self.stop.at_once(*self._alone_or(signal.SIGINT)):
                        self._prepare()
                    # Without a directory there is nothing that finishing the step would save.
                    with self.stop.at_once(signal.SIGINT) if self.trainer.output is None else contextlib.nullcontext():
                        self._train()
                        return self._finish()
            except BaseException as raised:
                error = self._ended_by(raised)
                note_failure(self, error)
                if error is raised:
                    raise
                raise error from None
            finally:
                if self.started:
                    self.logger.close()
                self.directory.close()

    def _alone_or(self, *signals: signal.Signals) -> tuple[signal.Signals, ...]:
        """Return which signals are met at once: all where this process is alone, else these, which reach every process."""
        return signals if self.distribution.world_size > 1 else (signal.SIGTERM, signal.SIGINT)

    def _ended_by(self, error: BaseException) -> BaseException:
        """Return what a run ends with that is interrupted where it can't save: a request by SIGTERM has an end of its own."""
        if isinstance(error, StopNow) and self.stop.requested == signal.SIGTERM:
            return self._stopped()
        if isinstance(error, KeyboardInterrupt):
            error.add_note(self._remains())
        if (lost := self.distribution.lost(error)) is not None:
            saved = self.state.saved_step if hasattr(self, "state") else 0
            kept = f", from the checkpoint of step {saved}" if saved else ", from the beginning"
            lost.fix = f"start all processes again with `--resume`{kept}"
            # The process that ended has said why, or another has said that it ended.
            lost.silent = lost.silent or self.directory.fault_noted(self.trainer.output)
            lost.__cause__ = error
            return lost
        return error

    def _remains(self) -> str:
        """Tell what an interrupted run leaves behind."""
        step = self.progress.step
        if self.directory.continued and not self.started:
            return "before it had resumed: its checkpoints are as they were"
        if not (self.started and step):
            return "before its first step"
        if self.state.saved_step:
            return f"after step {step}: `--resume` continues from the checkpoint of step {self.state.saved_step}"
        return f"after step {step}, with no checkpoint to continue from"

    # Before the first step

    def _open_directory(self) -> RunDirectory:
        opened: list[RunDirectory] = []

        def open_here() -> dict[str, Any]:
            opened.append(RunDirectory.open(self.trainer.output, resume=self.resume, overwrite=self.overwrite))
            return {"continued": opened[0].continued, "started": opened[0].record["started"]}

        main = self.distribution.on_main(open_here)
        return opened[0] if opened else RunDirectory(None, {"started": main["started"]}, continued=main["continued"])

    def _prepare(self) -> None:
        config, trainer = self.config, self.trainer
        self._check_resumable()
        for data in (trainer.data, trainer.eval_data):
            check_paths(data)
        self.micro_batches = MicroBatches(config, divide=trainer.splits_groups)
        loader = Loader(trainer, self.devices, self.micro_batches)
        seed_everything(config.seed, "model")
        self.parameters = build_models(trainer, loader, self.devices)
        self._take_up_config()
        self.dataset, self.eval_dataset = open_data(trainer, loader.given.tokenizer)
        note_inputs(self, loader)
        self.rewards.prepare()  # a reward's model that isn't there is known before the first rollout
        keep_texts(trainer, self.dataset)
        for data in (self.dataset, self.eval_dataset):
            if data is not None:
                trainer.inspect(data)
        self.distribution.same_parameters(trainer.models)
        precompute_reference(
            trainer, (self.dataset, self.eval_dataset), distribution=self.distribution, devices=self.devices
        )
        self._prepare_stream()
        self._require_disk()
        self.optimizer = create_optimizer(self.parameters.items(), config, loader.factors)
        self.loss_scale = LossScale(enabled=config.precision == "fp16")
        self.early_stopping = EarlyStopping.create(config.early_stopping) if config.early_stopping else None
        seed_everything(config.seed, "training", self.distribution.rank)
        self._restore()
        self.context = RunContext(
            trainer,
            self.distribution,
            self.devices,
            self.micro_batches,
            self.rewards,
            clock=lambda: self.progress.step,
            notify=self.hooks.emit,
            keep=self.logger.samples,
        )
        for name, pair in self.state.logged.items():
            self.context.log(name, *pair)
        self.update = Update(
            trainer,
            self.optimizer,
            self.parameters,
            distribution=self.distribution,
            devices=self.devices,
            micro_batches=self.micro_batches,
            loss_scale=self.loss_scale,
            notify=self.logger.event,
        )

    def _check_resumable(self) -> None:
        def compare() -> list[str]:
            before = self.directory.settings() if self.directory.continued else None
            return check_unchanged(before, self.settings, place=str(self.trainer.output)) if before else []

        self.changes = self.distribution.on_main(compare)

    def _take_up_config(self) -> None:
        """Go by the trainer's configuration with what only the model could tell."""
        if self.trainer.config is not self.config:
            self.config = self.trainer.config
            self.settings = run_settings(self.trainer)
            self._check_resumable()

    def _prepare_stream(self) -> None:
        """Make the stream and the schedule, with what the checkpoint of a continued run knows of their length."""
        self.state = RunState(self)
        self.checkpoint = self.state.find() if self.directory.continued else None
        saved = self.checkpoint.state if self.checkpoint is not None else None
        self.stream, self.total_steps = open_stream(
            self.trainer, self.dataset, distribution=self.distribution, saved=saved
        )
        # Where the data decide how many steps there are, the schedule runs over batches.
        self.schedule = Schedule.create(
            self.config, self.stream.steps if self.total_steps is None else self.total_steps
        )

    def _require_disk(self) -> None:
        """Refuse to begin where the disk has too little room for what the run will write."""
        output = self.trainer.output
        if output is None:
            return

        def require() -> None:
            need = need_of_run(self)
            free = need.require(output, there=room_taken(output))
            log.info("the run writes at most %s; %s bytes are free", need, f"{free:,}")

        self.distribution.on_main(require)

    def _restore(self) -> None:
        """Restore the newest whole checkpoint of a continued run, and start the log behind it."""
        if self.checkpoint is not None:
            self.state.put_back(self.checkpoint)
        # What listens writes files and talks to trackers: once, whatever the number of processes.
        self.hooks = load_hooks() if self.distribution.is_main else Hooks()
        self.logger = TrainingLogger(
            self.trainer.output,
            self.config.logging,
            total_steps=self.total_steps,
            step=self.progress.step,
            enabled=self.distribution.is_main,
            settings=self.settings,
        )
        self.started = True
        self._restore_log()
        for item in self.state.damaged():
            self.logger.event("checkpoint_damaged", step=item.step, path=item.path.name, reason=item.reason)
        if self.directory.continued:
            if self.checkpoint is None:
                log.warning("%s holds no checkpoint yet: starting at step 0", self.trainer.output)
            self.logger.event("run_resumed", step=self.progress.step, changed=self.changes)
        else:
            if self.resume:
                log.warning("%s holds no run to resume: starting one at step 0", self.trainer.output)
            self.logger.event("run_started", total_steps=self.total_steps)

    def _restore_log(self) -> None:
        """Cut the log back to the checkpoint. Its last row is in the checkpoint; an earlier one that is damaged is lost."""
        step = self.progress.step
        self.logger.rewind_samples(step, self.progress.evaluated)
        lost = self.logger.rewind(step)
        if lost[-1:] == [step]:
            self.logger.amend(self.progress.metrics)
            lost.pop()
        if lost:
            place = f"{self.trainer.output}/metrics.jsonl"
            which = "the row of 1 step is" if len(lost) == 1 else f"the rows of {len(lost)} steps are"
            log.warning("%s: %s damaged and left out: %s", place, which, _ranges(lost))
            self.logger.event("metrics_damaged", step=step, steps=lost)

    # The steps

    def _train(self) -> None:
        self.hooks.emit("run_started", run=self.trainer)
        self.began_at = self.progress.step
        self.saved_at = time.monotonic()
        for module in self.trainer.models.modules():
            if getattr(module, "fresh_adapter", False):
                # From the first step on the base isn't what was passed in, should this model be trained again.
                module.fresh_adapter = False  # type: ignore[assignment]
        self._stop_if_asked()
        if self.progress.evaluated != self.progress.step and self._evaluation_is_due(self.progress.step):
            # Of the start, or of a step that was saved before it could be evaluated.
            with self._stopping_at_once():
                self._evaluate_late()
            self._stop_if_asked()
        windows = Windows(
            self.trainer,
            self.stream,
            self.context,
            counted=self.config.max_steps is None,
            last_used=lambda: self.progress.batches,
        )
        while not self._at_end():
            began = time.perf_counter()
            window = self._next_window(windows)
            if window is None:
                break
            step = self.progress.step + 1
            rate = self.schedule(self._position())
            set_learning_rate(self.optimizer, rate)
            training_mode(self.trainer, True)
            outcome = self.update(window.batch, step)
            self.inside_rollout = not window.last
            if outcome is None:
                self._skip(window)
            else:
                self._commit(step, rate, outcome, time.perf_counter() - began)
            if window.last:
                self._evaluate_if_missed()
                self._save_or_stop()
        windows.finish()

    def _position(self) -> int:
        """Return which of the schedule's steps comes next, counted from 1; the same on every process."""
        if self.total_steps is None:
            return max(self.distribution.gather(self.stream.batches))
        # Windows without anything to learn from were steps of an epoch's too.
        return self.progress.step + 1 + (self.progress.skipped if self.config.max_steps is None else 0)

    def _at_end(self) -> bool:
        if self.early_stopping is not None and self.early_stopping.stopped:
            return True
        return self.total_steps is not None and self._position() > self.total_steps

    def _next_window(self, windows: Windows) -> Window | None:
        """Let the method make its next window, without gradients and in evaluation mode."""
        training_mode(self.trainer, False)
        made = try_to_fit(lambda: self._made(windows), self.devices.device)
        if made is None:
            raise NumbersError(
                "out of memory while the method made its experience",
                place=f"step {self.progress.step + 1}",
                fix="set a smaller `micro_batch_size`; a method forwards whole windows through `run.forward`",
            )
        return made.value if self.distribution.all(made.value is not None) else None

    def _made(self, windows: Windows) -> Window | None:
        with torch.no_grad(), self.devices.autocast(self.config.precision):
            return next(windows, None)

    def _commit(self, step: int, rate: float, outcome: Outcome, seconds: float) -> None:
        """Count the step, evaluate where it is due, and write its row."""
        progress = self.progress
        progress.step, progress.batches = step, self.stream.batches
        progress.tokens += outcome.tokens
        progress.seconds += seconds
        row: dict[str, Any] = {"step": step, "loss": outcome.loss, "learning_rate": rate}
        row |= {"grad_norm": outcome.grad_norm, "tokens": outcome.tokens}
        logged = quotients(sum_pairs(self.distribution, self.context.logged()))
        metrics = {**logged, **outcome.metrics}
        clash = {*REQUIRED, *TIMING} & metrics.keys() or logged.keys() & outcome.metrics.keys()
        if clash:
            name = min(clash)
            raise PluginError(
                f"a metric may not be named `{name}`, which is reported already", place=type(self.trainer).__name__
            )
        row |= metrics
        timing = dict(zip(TIMING, (seconds, outcome.tokens / seconds), strict=True))
        if not self.inside_rollout and self._evaluation_is_due(step):
            progress.metrics = row | timing
            row |= self._evaluate_or_save()
        row |= timing
        progress.metrics = row
        self.logger.metrics(row)
        self.hooks.emit("step_ended", run=self.trainer, step=step, metrics=row)

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.eval_steps
        if self.eval_dataset is None:
            return False
        if step == 0:
            return every is not None
        return step == self.total_steps or (
            every is not None and step // every > (self.progress.evaluated or 0) // every
        )

    def _skip(self, window: Window) -> None:
        progress = self.progress
        progress.skipped += 1
        self.logger.event("window_skipped", step=progress.step, rows=list(window.batch.rows), skipped=progress.skipped)

    def _evaluate_if_missed(self) -> None:
        """Evaluate at a rollout's end what was due inside it; the last window may have been skipped.

        A run that is resumed here evaluates at once, so one that never was must, too.
        """
        if self.progress.evaluated != self.progress.step and self._evaluation_is_due(self.progress.step):
            with self._stopping_at_once():
                self._evaluate_late()

    def _evaluate_or_save(self) -> dict[str, float]:
        """Evaluate; where that fails or is stopped, what was learned is saved first, and a resume evaluates it.

        Not among several processes, where the others may be waiting inside the evaluation.
        """
        if self.distribution.world_size > 1:
            return self._evaluate()
        try:
            with self.stop.at_once():
                return self._evaluate()
        except (Exception, StopNow) as error:
            self.logger.metrics(self.progress.metrics)
            self._save()
            if isinstance(error, StopNow) and self.trainer.output is not None:
                raise self._stopped() from None
            raise

    def _log_early_stop(self, value: float) -> None:
        """Say that early stopping ends the run, and why."""
        stopping, step = self.early_stopping, self.progress.step
        assert stopping is not None
        log.info(
            "step %d: stopped early, after %d evaluations without improvement: `%s` is %.6g now; %s",
            step, stopping.waited, stopping.metric, value, stopping.describe(),
        )  # fmt: skip
        numbers = {
            "value": value,
            "best": stopping.best,
            "best_step": stopping.best_step,
            "patience": stopping.patience,
        }
        self.logger.event("early_stopped", step=step, metric=stopping.metric, **numbers)

    @contextlib.contextmanager
    def _stopping_at_once(self) -> Iterator[None]:
        """Within, a request to stop is met at once, since there is nothing left to learn before the state can be saved."""
        if self.distribution.world_size > 1:
            yield
            return
        try:
            with self.stop.at_once():
                yield
        except StopNow:
            self._save()
            if self.state.saved_step != self.progress.step or not self.progress.step:
                raise
            raise self._stopped() from None

    def _evaluate(self) -> dict[str, float]:
        assert self.eval_dataset is not None
        metrics = evaluate(self.trainer, self.eval_dataset, self.context.for_evaluation())
        step = self.progress.step
        self.progress.evaluated, self.progress.eval_metrics = step, metrics
        log.info("step %d  %s", step, _shown(metrics))
        self.logger.event("evaluated", step=step, metrics=metrics)
        self.hooks.emit("evaluated", run=self.trainer, step=step, metrics=metrics)
        if self.early_stopping is not None:
            self.early_stopping.check(metrics)  # at step 0 already, before a wrong name can lose a step
            if self.early_stopping.update(metrics, step) and step:
                self._log_early_stop(float(metrics[self.early_stopping.metric]))
        return metrics

    def _save_or_stop(self) -> None:
        """Save where it is due by steps or by the first process's clock; on a request to any process all save and stop."""
        checkpoint, step = self.config.checkpoint, self.progress.step
        late = checkpoint.minutes is not None and time.monotonic() - self.saved_at >= 60 * checkpoint.minutes
        stopping, late = self.distribution.flags(self.stop.requested is not None, late and self.distribution.is_main)
        every = checkpoint.every and step // checkpoint.every > self.state.saved_step // checkpoint.every
        if stopping or late or every or self._is_best(step):
            self._save()
        if stopping:
            raise self._stopped()

    def _is_best(self, step: int) -> bool:
        config = self.config.early_stopping
        return config is not None and config.keep_best and self.early_stopping is not None and (
            self.early_stopping.best is not None and self.early_stopping.best_step == step
        )  # fmt: skip

    def _stop_if_asked(self) -> None:
        """Stop where nothing was learned since the last checkpoint, or nothing at all."""
        if self.distribution.any(self.stop.requested is not None):
            raise self._stopped()

    def _stopped(self) -> Stopped:
        resuming = self.directory.continued and not self.started
        end = stopped(self.progress.step, self.trainer.output, resuming=resuming)
        end.silent = not self.distribution.is_main
        return end

    def _save(self) -> None:
        if self.trainer.output is None or self.progress.step == self.state.saved_step or not self.progress.step:
            return
        self.logger.flush()
        path = self.state.save()
        self.directory.update(step=self.progress.step)
        self.logger.event("checkpoint_saved", step=self.progress.step, path=path.name)
        self.hooks.emit("checkpoint_saved", run=self.trainer, step=self.progress.step, path=path)
        self.saved_at = time.monotonic()

    # The end

    def _finish(self) -> TrainResult:
        progress = self.progress
        if self.eval_dataset is not None and progress.evaluated != progress.step:
            if self.distribution.world_size > 1:
                self._save()  # whatever the evaluation of several processes may meet, what was learned stands
            with self._stopping_at_once():
                self._evaluate_late()
        self._save()
        note_data(self)
        if steps := progress.step - self.began_at:
            for role in sorted(self.update.untouched):
                log.warning("`%s` is trained, and got no gradient in %d steps: it is exported as it was", role, steps)
        model_step = self._take_best()
        if (stopping := self.early_stopping) is not None and stopping.never_improved:
            log.warning(
                "no evaluation was better than the one before the first step: `%s` was %g there, and %g at its best",
                stopping.metric,
                stopping.start,
                stopping.best,
            )
        with self._stopping_at_once():
            model_dir = export_models(self.trainer, self.distribution)
        result = TrainResult(
            step=progress.step,
            metrics=progress.metrics,
            eval_metrics=progress.eval_metrics,
            output=self.trainer.output,
            model_dir=model_dir,
            seconds=progress.seconds,
            tokens=progress.tokens,
            stopped_early=self.early_stopping is not None and self.early_stopping.stopped,
            best_step=self.early_stopping.best_step if self.early_stopping is not None else None,
            model_step=model_step,
        )
        self.directory.record |= {"peak_memory_bytes": self.devices.peak_memory(), "skipped_windows": progress.skipped}
        self.directory.record |= {"best_step": result.best_step, "model_step": model_step}
        self.directory.end("done", 0, step=progress.step)
        self.logger.event(
            "run_ended", step=progress.step, stopped_early=result.stopped_early, model_step=result.model_step
        )
        self.hooks.emit("run_ended", run=self.trainer, result=result)
        return result

    def _take_best(self) -> int:
        """Give the models their best weights where early stopping keeps them; return the step that the models are of."""
        stopping, config, step = self.early_stopping, self.config.early_stopping, self.progress.step
        if (
            stopping is None
            or config is None
            or not config.keep_best
            or stopping.best is None
            or stopping.best_step == step
        ):
            return step
        if self.state.take_best(stopping.best_step):
            log.info("the model of step %d is exported: %s", stopping.best_step, stopping.describe())
            self.progress.eval_metrics = dict(stopping.best_metrics)
            return stopping.best_step
        log.warning(
            "no checkpoint of step %d is there, so the model stays that of step %d: %s",
            stopping.best_step, step, stopping.describe(),
        )  # fmt: skip
        return step

    def _evaluate_late(self) -> None:
        """Evaluate after a step's row was written, and put the result into it."""
        metrics = self._evaluate()
        if self.progress.step:
            self.progress.metrics |= metrics
            self.logger.amend(self.progress.metrics)


def _ranges(steps: Sequence[int], limit: int = 8) -> str:
    """Return ascending steps as text, neighbours as ranges: `1-3, 7`."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:limit]]
    return ", ".join(shown) + (" …" if len(ranges) > limit else "")


def _shown(metrics: Mapping[str, float]) -> str:
    """Return metrics for a line on the console, standard errors behind what they belong to."""
    errors = {name: f" ± {metrics[name + '_se']:.4f}" for name in metrics if name + "_se" in metrics}
    of_errors = {name + "_se" for name in errors}
    shown = {name: value for name, value in metrics.items() if name not in of_errors}
    return "  ".join(f"{name} {value:.4f}{errors.get(name, '')}" for name, value in shown.items())
