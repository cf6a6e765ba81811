"""The loop of optimiser steps: a window from the method, one update, its row in the log, evaluation, a checkpoint.

What a step computes is a function of the configuration and of the state in the checkpoint alone, so a run that is killed and
resumed makes the same updates as one that was never killed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.contracts.trainer import Window
from rlhf_core.infra.errors import ConfigError, NumbersError, PluginError
from rlhf_core.infra.out_of_memory import try_to_fit
from rlhf_core.training.logger import REQUIRED, TIMING
from rlhf_core.training.online_metrics import GAP, gap_metrics, with_deviations
from rlhf_core.training.optimizer import set_learning_rate
from rlhf_core.training.phases import UPDATE, phase_metrics
from rlhf_core.training.reduction import quotients, sum_pairs
from rlhf_core.training.roles import set_training_mode
from rlhf_core.training.run_record import record_choices
from rlhf_core.training.update import UpdateResult
from rlhf_core.training.windows import Windows

if TYPE_CHECKING:
    from rlhf_core.training.run import Run

log = logging.getLogger(__name__)


class TrainingLoop:
    """Makes the optimiser steps of one run, from the step that it starts or resumes at to its last."""

    def __init__(self, run: Run) -> None:
        self._run, self._setup, self._config = run, run.setup, run.setup.config
        self._evaluations, self._distribution = run.evaluations, run.distribution
        self._warned = False
        """Whether the user was warned, in this process, of rewards that teach nothing."""

    def train(self) -> None:
        """Make steps until the schedule, the data, early stopping or a request to stop ends them.

        Raises:
            Stopped: the run was asked to stop; its state is saved.
        """
        run, progress = self._run, self._run.progress
        self._stop_if_asked()
        self._evaluations.catch_up()
        run.fixed_prompts.catch_up()
        self._stop_if_asked()
        windows = Windows(
            run.trainer,
            run.stream,
            run.context,
            counted=self._config.max_steps is None,
            batches_used=lambda: progress.batches,
        )
        while not self._at_end():
            began = time.perf_counter()
            window = self._next_window(windows)
            if window is None:
                break
            step = progress.step + 1
            rate = run.schedule(self._schedule_step())
            set_learning_rate(run.optimizer, rate)
            set_training_mode(run.trainer, True)
            with run.context.phase(UPDATE):
                result = run.updater(window.batch, step)
            if result is not None:
                run.context.phases.add_tokens(UPDATE, window.batch.num_tokens)
            run.inside_rollout = not window.last
            if result is None:
                self._skip(window)
            else:
                self._finish_step(step, rate, result, time.perf_counter() - began)
            if window.last:
                self._keep_untrained()
                self._evaluations.catch_up()
                run.fixed_prompts.catch_up()
                self._save_or_stop()
        windows.finish()
        self._keep_untrained()

    def _schedule_step(self) -> int:
        """Return which of the schedule's steps comes next, counted from 1; the same on every process."""
        run, progress = self._run, self._run.progress
        if run.total_steps is None:
            return max(self._distribution.gather(run.stream.batches))
        # Skipped windows count among the steps of an epoch, too.
        return progress.step + 1 + (progress.skipped if self._config.max_steps is None else 0)

    def _at_end(self) -> bool:
        """Return whether early stopping, the KL budget or the schedule has ended the run; only the last one inside a rollout."""
        total = self._run.total_steps
        return (self._run.stopped_early and not self._run.inside_rollout) or (
            total is not None and self._schedule_step() > total
        )

    def _next_window(self, windows: Windows) -> Window | None:
        """Return the method's next window, made without gradients and in evaluation mode; None at the end of the data."""
        set_training_mode(self._run.trainer, False)

        def make() -> Window | None:
            with torch.no_grad(), self._setup.devices.autocast(self._config.precision):
                return next(windows, None)

        made = try_to_fit(make, self._setup.devices.device)
        if made is None:
            raise NumbersError(
                "out of memory while the method made its experience",
                place=f"step {self._run.progress.step + 1}",
                fix="set a smaller `micro_batch_size`; a method forwards whole windows through `run.forward`",
            )
        return made.value if self._distribution.all(made.value is not None) else None

    def _finish_step(self, step: int, rate: float, result: UpdateResult, seconds: float) -> None:
        """Count a step, evaluate if that is due, and write its row of metrics."""
        run, progress = self._run, self._run.progress
        progress.step, progress.batches = step, run.stream.batches
        progress.tokens += result.tokens
        progress.seconds += seconds
        row: dict[str, Any] = {"step": step, "loss": result.loss, "learning_rate": rate}
        row |= {"grad_norm": result.grad_norm, "tokens": result.tokens}
        logged = with_deviations(quotients(sum_pairs(self._distribution, run.context.logged())))
        if run.context.rollout.fresh:
            gaps = result.responses.get(GAP, {})
            run.context.rollout.note_gaps(gaps)
            logged |= gap_metrics(self._distribution.gather(list(gaps.values())))
            self._keep_rollout(step - 1)
        metrics = {**logged, **result.metrics}
        metrics |= run.kl_budget.update(metrics)
        if run.context.replay is not None and not run.context.replay.used:
            raise ConfigError(
                "nothing was replayed: the method doesn't generate by `run.generate` or `run.generate_and_score`",
                place="replay",
                fix="leave it out",
            )
        if clash := {*REQUIRED, *TIMING} & metrics.keys() or logged.keys() & result.metrics.keys():
            raise PluginError(
                f"a metric may not be named `{min(clash)}`, which is reported already", place=type(run.trainer).__name__
            )
        row |= metrics
        timing = dict(zip(TIMING, (seconds, result.tokens / seconds), strict=True))
        timing |= phase_metrics(self._distribution.gather(run.context.phases.take()))
        if not run.inside_rollout and self._evaluations.is_due(step):
            progress.metrics = row | timing
            run.logger.show(progress.metrics)
            row |= self._evaluations.evaluate_or_save()
        row |= timing
        progress.metrics = row
        run.logger.metrics(row)
        record_choices(run)
        run.hooks.emit("step_ended", run=run.trainer, step=step, metrics=row)
        self._refuse_equal_rewards(row)
        if run.kl_budget.spent and not run.inside_rollout:
            run.kl_budget.report(step, run.logger.event)

    def _keep_rollout(self, step: int) -> None:
        """Write the rollout that was drawn after `step`, with those before it that made no step."""
        rollouts, taken = self._run.logger.rollouts, self._run.context.rollout.take()
        if rollouts.wanted:
            parts = self._distribution.gather(rollouts.chosen(taken, step))
            self._distribution.on_main(lambda: rollouts.write(parts, step))

    def _keep_untrained(self) -> None:
        """Write a rollout of which no window made a step: a checkpoint holds what was drawn before it, and so does the file."""
        if self._run.context.rollout.fresh:
            self._keep_rollout(self._run.progress.step)

    def _refuse_equal_rewards(self, row: Mapping[str, Any]) -> None:
        """Warn at the first rollout in whose groups all rewards are equal; refuse `max_idle_batches` of them in a row.

        A value model also learns from how the rewards of different prompts differ: with one, all rewards must be equal. Without
        one, advantages may still differ from 0, such as those over the whole batch, or of rewards that a KL or a length changes.
        """
        what, share, said = "all rewards of each prompt are equal", row.get("groups_without_variance"), self._said()
        if "value" in self._run.trainer.models:
            what, share = "all rewards are equal", None
            if "reward_std" in row:  # 0 but for rounding
                share = float(row["reward_std"] <= 1e-6 * abs(row["reward"]))
            if said is False and share == 0:
                what, share = "no reward counts, as no completion has ended", 1
        elif share == 1 and said:
            share = 0
        if share is None:
            return
        progress = self._run.progress
        progress.alike = progress.alike + 1 if share == 1 else 0
        shown = self._run.context.rollout.rewards_shown()
        if progress.alike == 1 and not self._warned:
            self._warned = True
            log.warning("step %d: %s, so they teach nothing: %s", row["step"], what, shown)
        if progress.alike > self._config.max_idle_batches:
            raise NumbersError(
                f"in {progress.alike} rollouts in a row {what}, so they teach nothing",
                place=f"step {row['step']}",
                got=shown,
                fix="look at the completions (`rlhf rollouts RUN`) and the rewards: prompts that are too easy or too hard, a"
                " reward that no completion gets, a limit (`generation.max_new_tokens`) that truncates all; a larger"
                " `max_idle_batches` allows more of them",
            )

    def _said(self) -> bool | None:
        """Return whether the method said that the last rollout's rewards teach, on any process; None where it said nothing."""
        teaches = self._run.context.rollout.teaches
        return None if teaches is None else self._distribution.any(teaches)

    def _skip(self, window: Window) -> None:
        """Count a window that made no step, because every weight in it was zero."""
        run, progress = self._run, self._run.progress
        progress.skipped += 1
        run.logger.event("window_skipped", step=progress.step, rows=list(window.batch.rows), skipped=progress.skipped)

    def _save_or_stop(self) -> None:
        """Save if a checkpoint is due by steps or by the first process's clock; where any process is asked to stop, all do."""
        run, options, step = self._run, self._config.checkpoint, self._run.progress.step
        late = options.minutes is not None and time.monotonic() - run.saved_at >= 60 * options.minutes
        stopping, late, ending = self._distribution.flags(
            run.stop.requested is not None, late and self._distribution.is_main, self._ends_between()
        )
        every = options.every and step // options.every > run.state.saved_step // options.every
        if stopping or late or every or ending or step == self._evaluations.best_step:
            run.save()
        if stopping:
            raise run.stopped()

    def _ends_between(self) -> bool:
        """Return whether the run ends inside the next rollout, or with a smaller batch: a longer run continues from before it."""
        planned, windows = self._config.max_steps, self._run.trainer.windows_per_batch()
        if self._config.checkpoint.minutes is None and not self._config.checkpoint.every:
            return False  # no checkpoint but the last is wanted
        if planned is None:
            return self._run.stream.at_smaller_end
        return windows is not None and 0 < planned - self._run.progress.step < windows

    def _stop_if_asked(self) -> None:
        """Stop before the first step of this process, when nothing has been trained since the last checkpoint."""
        if self._distribution.any(self._run.stop.requested is not None):
            raise self._run.stopped()
