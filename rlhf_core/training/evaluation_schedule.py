"""When a run evaluates its held-out data, and what follows: a row of the log, an event, early stopping, the best step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rlhf_core.training.early_stopping import EarlyStopping
from rlhf_core.training.held_out import evaluate
from rlhf_core.training.metric_text import evaluation_line
from rlhf_core.training.signals import StopNow

if TYPE_CHECKING:
    from rlhf_core.training.run import Run

log = logging.getLogger(__name__)


class EvaluationSchedule:
    """Evaluates one run: at its start, every `eval_steps`, and at its end; never inside a rollout.

    The result belongs to the row of the step that was just made. A step that was saved before it could be evaluated is evaluated
    when the run resumes, so a resumed run evaluates the same steps as one that was never stopped.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._config = run, run.setup.config
        options = self._config.early_stopping
        self.early_stopping = EarlyStopping.create(options) if options is not None else None

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation is due after `step`, given the last one."""
        every = self._config.eval_steps
        if self._run.setup.eval_dataset is None:
            return False
        if step == 0:
            return every is not None
        return step == self._run.total_steps or (
            every is not None and step // every > (self._run.progress.evaluated or 0) // every
        )

    def evaluate_or_save(self) -> dict[str, float]:
        """Evaluate the step that was just made, whose row isn't written yet; return the metrics.

        Where the evaluation fails or a request to stop interrupts it, the step's row and state are saved first. Not with several
        processes, of which the others may be waiting inside the evaluation.
        """
        run = self._run
        if run.distribution.world_size > 1:
            return self._evaluate()
        try:
            with run.stop.at_once():
                return self._evaluate()
        except (Exception, StopNow) as error:
            run.logger.metrics(run.progress.metrics)
            run.save()
            if isinstance(error, StopNow) and run.trainer.output is not None:
                raise run.stopped() from None
            raise

    def catch_up(self) -> None:
        """Evaluate the last step now if that is due and hasn't been done, and add the result to its row.

        It is due but not done at the start of a run, after a resume, and where it fell due inside a rollout.
        """
        if self._run.progress.evaluated != self._run.progress.step and self.is_due(self._run.progress.step):
            with self._run.stopping_at_once():
                self._evaluate_late()

    def finish(self) -> None:
        """Evaluate the last step of the run, if that hasn't been done."""
        run = self._run
        if run.setup.eval_dataset is not None and run.progress.evaluated != run.progress.step:
            if run.distribution.world_size > 1:
                run.save()  # whatever happens to the evaluation of several processes, the training is saved
            with run.stopping_at_once():
                self._evaluate_late()

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping has ended the run."""
        return self.early_stopping is not None and self.early_stopping.stopped

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint with the best metric is kept, and its model exported."""
        options = self._config.early_stopping
        return options is not None and options.keep_best

    def is_best(self, step: int) -> bool:
        """Return whether `step` has the best metric so far, and its checkpoint is to be kept for that."""
        stopping = self.early_stopping
        return self.keeps_best and stopping is not None and stopping.best is not None and stopping.best_step == step

    def restore_best(self) -> int:
        """Load the best weights into the models where early stopping keeps them; return the step whose weights they now have."""
        run, stopping, step = self._run, self.early_stopping, self._run.progress.step
        if not self.keeps_best or stopping is None or stopping.best is None or stopping.best_step == step:
            return step
        if run.state.restore_model(stopping.best_step):
            log.info("the model of step %d is exported: %s", stopping.best_step, stopping.describe())
            run.progress.eval_metrics = dict(stopping.best_metrics)
            return stopping.best_step
        log.warning(
            "no whole checkpoint of step %d is left, so the model of step %d is exported: %s",
            stopping.best_step, step, stopping.describe(),
        )  # fmt: skip
        return step

    def _evaluate(self) -> dict[str, float]:
        """Evaluate after the current step, report the metrics to log, hooks and early stopping, and return them."""
        run, setup = self._run, self._run.setup
        assert setup.eval_dataset is not None
        metrics = evaluate(run.trainer, setup.eval_dataset, run.context.for_evaluation())
        step = run.progress.step
        run.progress.evaluated, run.progress.eval_metrics = step, metrics
        log.info("step %d  %s", step, evaluation_line(metrics))
        run.logger.event("evaluated", step=step, metrics=metrics)
        run.hooks.emit("evaluated", run=run.trainer, step=step, metrics=metrics)
        if self.early_stopping is not None:
            self.early_stopping.check(metrics)  # at step 0 already: a wrong name ends the run before any training
            if self.early_stopping.update(metrics, step) and step:
                self._report_early_stop(self.early_stopping, float(metrics[self.early_stopping.metric]))
        return metrics

    def _evaluate_late(self) -> None:
        """Evaluate after a step's row was written, and add the result to the row."""
        metrics, progress = self._evaluate(), self._run.progress
        if progress.step:
            progress.metrics |= metrics
            self._run.logger.amend(progress.metrics)

    def _report_early_stop(self, stopping: EarlyStopping, value: float) -> None:
        """Log that early stopping ends the run, and why."""
        step = self._run.progress.step
        log.info(
            "step %d: stopped early, after %d evaluations without improvement: `%s` is %.6g now; %s",
            step, stopping.waited, stopping.metric, value, stopping.describe(),
        )  # fmt: skip
        self._run.logger.event(
            "early_stopped",
            step=step,
            metric=stopping.metric,
            value=value,
            best=stopping.best,
            best_step=stopping.best_step,
            patience=stopping.patience,
        )
