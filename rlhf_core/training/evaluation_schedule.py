"""When a run evaluates its held-out data, and what follows: a row of the log, an event, early stopping, the best step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rlhf_core.training.early_stopping import BestEvaluation, EarlyStopping, best_evaluation_of, early_stopping_of
from rlhf_core.training.held_out import evaluate
from rlhf_core.training.metric_text import evaluation_table
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
        self.early_stopping = early_stopping_of(self._config)
        self.keep_best = best_evaluation_of(self._config)
        """The best evaluation by the option `keep_best`; None without it."""

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
    def watched(self) -> BestEvaluation | None:
        """What says which evaluation was the best: `keep_best`, else early stopping; None without either."""
        return self.keep_best or self.early_stopping

    @property
    def kept(self) -> BestEvaluation | None:
        """What says which checkpoint is kept as the best, and exported; None where the last one is exported."""
        return self.watched if self._config.exported_by is not None else None

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint is kept as the best; None where none is yet."""
        return self.kept.best_step if self.kept is not None and self.kept.best is not None else None

    def restore_best(self) -> int:
        """Load the best weights into the models where they are kept; return the step whose weights the models now have."""
        run, kept, step = self._run, self.kept, self._run.progress.step
        if kept is None or kept.best is None or kept.best_step == step:
            return step
        if run.state.restore_model(kept.best_step):
            log.info("the model of step %d is exported: %s", kept.best_step, kept.describe())
            run.progress.eval_metrics = dict(kept.best_metrics)
            return kept.best_step
        log.warning(
            "no whole checkpoint of step %d is left, so the model of step %d is exported: %s",
            kept.best_step, step, kept.describe(),
        )  # fmt: skip
        return step

    def _evaluate(self) -> dict[str, float]:
        """Evaluate after the current step, report the metrics to log, hooks and early stopping, and return them."""
        run, setup = self._run, self._run.setup
        assert setup.eval_dataset is not None
        metrics = evaluate(run.trainer, setup.eval_dataset, run.context.for_evaluation())
        step = run.progress.step
        before = run.progress.eval_metrics, run.progress.evaluated or 0
        log.info("%s", evaluation_table(metrics, step, *before))
        run.progress.evaluated, run.progress.eval_metrics = step, metrics
        run.logger.event("evaluated", step=step, metrics=metrics)
        run.hooks.emit("evaluated", run=run.trainer, step=step, metrics=metrics)
        for watched in (self.keep_best, self.early_stopping):
            if watched is not None:
                watched.check(metrics)  # at step 0 already: a wrong name ends the run before any training
        if self.keep_best is not None:
            self.keep_best.note(metrics, step)
        if self.early_stopping is not None and self.early_stopping.update(metrics, step) and step:
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
