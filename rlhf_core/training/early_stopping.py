"""The best evaluation of a run; what ends a run early: a metric that no longer improves, a policy too far from its reference."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import EarlyStoppingConfig, KeepBestConfig, TrainerConfig
from rlhf_core.infra.errors import ConfigError, did_you_mean
from rlhf_core.training.run_state_schema import metrics_as_text, metrics_from_text

log = logging.getLogger(__name__)


KL_SHARE = 0.1
"""Share of a step's KL in its running mean: one noisy step counts a tenth, a lasting change for two thirds after ten steps."""


class KLBudget:
    """Ends a run whose policy is too far from its reference, by the running mean of the steps' KL.

    m_t = 0.9 m_{t-1} + 0.1 kl_t, from m_0 = 0, which the KL is before the first step. The KL of one step is an estimate from few
    completions, and may be several times the true one.

    Args:
        most: nats per token; None allows any.
    """

    def __init__(self, most: float | None) -> None:
        self.most = most
        self.mean = 0.0
        """The running mean of the KL, nats per token."""

    @classmethod
    def create(cls, config: TrainerConfig) -> KLBudget:
        """Return the budget of a configuration; only online methods may have one."""
        return cls(config.kl_budget if isinstance(config, OnlineConfig) else None)

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Count the KL of a step's metrics in the mean; return the mean as a metric where there is a budget.

        Raises:
            ConfigError: there is a budget, and the method doesn't report the KL.
        """
        kl = metrics.get("kl")
        if kl is None and self.most is not None:
            problem = "the method reports no KL to the reference (the metric `kl`)"
            raise ConfigError(problem, place="kl_budget", fix="give the KL a weight, or leave `kl_budget` out")
        if kl is not None and not math.isnan(kl):
            self.mean += KL_SHARE * (kl - self.mean)
        return {} if self.most is None else {"kl_mean": self.mean}

    @property
    def spent(self) -> bool:
        """Whether the mean is above the budget."""
        return self.most is not None and self.mean > self.most

    def report(self, step: int, notify: Callable[..., None]) -> None:
        """Log that the budget ends the run."""
        log.info("step %d: stopped early: %s", step, self.why())
        notify("early_stopped", step=step, metric="kl_mean", value=self.mean, budget=self.most)

    def why(self) -> str:
        """Return why the budget ended the run, as text."""
        return f"the running mean of the KL to the reference is {self.mean:.4g}, above `kl_budget` {self.most:.4g}"

    def state_dict(self) -> dict[str, str]:
        """Return the mean as JSON values."""
        return {"mean": repr(self.mean)}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Restore what `state_dict` returned."""
        self.mean = float(state["mean"])


class BestEvaluation:
    """The best evaluation of a run so far, by one metric.

    Args:
        metric: its name in an evaluation, such as `eval_loss`.
        mode: whether smaller (`min`) or larger (`max`) is better.
        min_delta: an improvement is a change by more than this.
        option: the option that names the metric, for messages.
    """

    def __init__(
        self,
        metric: str = "eval_loss",
        mode: Literal["min", "max"] = "min",
        *,
        min_delta: float = 0.0,
        option: str = "keep_best",
    ) -> None:
        self.metric, self.mode, self.min_delta, self.option = metric, mode, min_delta, option
        self.start: float | None = None
        """The metric before the first step; None where it wasn't evaluated or finite."""
        self.best: float | None = None
        """The best finite value so far, after the first step."""
        self.best_step = 0
        self.best_metrics: dict[str, float] = {}
        """All metrics of the best evaluation."""
        self.lost: tuple[int, float] | None = None
        """(step, value) of an evaluation that was better than the best, whose checkpoint was gone when `recall` compared it."""

    def describe(self) -> str:
        """Return the best value and its step as text."""
        if self.best is None:
            return f"`{self.metric}` was never finite"
        left = "" if self.lost is None else f"; {self.describe_lost()}"
        return f"`{self.metric}` was best at step {self.best_step}: {self.best:.6g}{left}"

    def describe_lost(self) -> str:
        """Return what is known of a better evaluation whose checkpoint is gone, as text; "" where there is none."""
        if self.lost is None:
            return ""
        return f"it was {self.lost[1]:.6g} at step {self.lost[0]}, whose checkpoint is gone"

    def check(self, metrics: Mapping[str, float]) -> None:
        """Refuse an evaluation without the watched metric.

        Raises:
            ConfigError: names the metric with the nearest name.
        """
        if self.metric not in metrics:
            raise ConfigError(
                f"evaluation gives no metric `{self.metric}`",
                place=f"{self.option}.metric",
                fix=did_you_mean(self.metric, metrics),
            )

    def note(self, metrics: Mapping[str, float], step: int) -> bool:
        """Compare the metrics of an evaluation after `step`, which `check` accepts, with the best; return whether they win.

        Those of step 0 are the start, which isn't compared.
        """
        value = float(metrics[self.metric])
        if step == 0:
            self.start = value if math.isfinite(value) else None
            return False
        if not self._improves(value):
            return False
        self.best, self.best_step, self.best_metrics = value, step, dict(metrics)
        if self.lost is not None and self._gain(value, self.lost[1]) >= 0:
            self.lost = None
        return True

    def recall(self, evaluations: Mapping[int, Mapping[str, float]], kept: Collection[int]) -> None:
        """Find the best of a run's earlier evaluations, which were made while this metric wasn't watched.

        Args:
            evaluations: their metrics by step; those without this metric are passed over.
            kept: steps whose checkpoints are still there, of which one can be the best. A better one without is `lost`.
        """
        values = {step: metrics for step, metrics in sorted(evaluations.items()) if self.metric in metrics}
        for step, metrics in values.items():
            if step == 0 or step in kept:
                self.note(metrics, step)
        for step, metrics in values.items():
            value = float(metrics[self.metric])
            than = self.lost[1] if self.lost is not None else self.best
            if step and step not in kept and math.isfinite(value) and (than is None or self._gain(value, than) > 0):
                self.lost = (step, value)

    @property
    def never_improved(self) -> bool:
        """Whether the model was evaluated before the first step, and never better afterwards."""
        if self.start is None or self.best is None:
            return False
        if self.lost is not None and self._gain(self.lost[1], self.start) > 0:
            return False
        return self.best >= self.start if self.mode == "min" else self.best <= self.start

    def _improves(self, value: float) -> bool:
        """Return whether a value is better than the best so far by more than `min_delta`; one that isn't finite never is."""
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        return self._gain(value, self.best) > self.min_delta

    def _gain(self, value: float, than: float) -> float:
        """Return by how much a value is better than another."""
        return than - value if self.mode == "min" else value - than

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its step and metrics, and the start, as JSON values."""
        found: dict[str, Any] = {"metric": self.metric, "mode": self.mode, "start": self.start, "best": self.best}
        found |= {"best_step": self.best_step, "best_metrics": metrics_as_text(self.best_metrics)}
        return found if self.lost is None else {**found, "lost_step": self.lost[0], "lost_value": self.lost[1]}

    def is_of(self, state: Mapping[str, Any]) -> bool:
        """Return whether a `state_dict` is of this metric and direction, so that its values can be compared."""
        return state.get("metric") in (None, self.metric) and state.get("mode") in (None, self.mode)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, if `is_of` is true of it; else this begins at nothing."""
        if not self.is_of(state):
            return
        self.start, self.best, self.best_step = state["start"], state["best"], int(state["best_step"])
        self.best_metrics = metrics_from_text(state["best_metrics"])
        lost_step, lost_value = state.get("lost_step"), state.get("lost_value")
        self.lost = None if lost_step is None or lost_value is None else (lost_step, lost_value)


class EarlyStopping(BestEvaluation):
    """Watches one metric; stops after `patience` evaluations in a row without improvement.

    Args:
        metric, mode, min_delta: as of `BestEvaluation`.
        patience: evaluations in a row without improvement after which it stops.
    """

    def __init__(
        self,
        metric: str = "eval_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(metric, mode, min_delta=min_delta, option="early_stopping")
        self.patience = patience
        self.waited = 0
        """Evaluations in a row without improvement."""

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience

    def why(self) -> str:
        """Return why it stopped, as text."""
        return f"{self.waited} evaluations without improvement (`patience` {self.patience}): {self.describe()}"

    def update(self, metrics: Mapping[str, float], step: int) -> bool:
        """Count an evaluation after `step`, which `check` accepts; return whether to stop. Step 0 is the start."""
        improved = self.note(metrics, step)
        self.waited = 0 if improved else self.waited + (step > 0)
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the best, and the count of evaluations since, as JSON values."""
        return {**super().state_dict(), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, if `is_of` is true of it; else this begins at nothing."""
        super().load_state_dict(state)
        self.waited = int(state["waited"]) if self.is_of(state) else 0


def early_stopping_of(config: TrainerConfig) -> EarlyStopping | None:
    """Return early stopping under the options of a run; None without it."""
    asked = config.early_stopping
    if asked is None:
        return None
    return EarlyStopping(asked.metric, _direction(asked), asked.patience, asked.min_delta)


def best_evaluation_of(config: TrainerConfig) -> BestEvaluation | None:
    """Return what finds the best evaluation by `keep_best`; None without that option."""
    asked = config.keep_best
    return None if asked is None else BestEvaluation(asked.metric, _direction(asked))


def exported_evaluation_of(config: TrainerConfig) -> BestEvaluation | None:
    """Return what finds the evaluation whose checkpoint is kept and exported; None where the last one is exported."""
    return None if config.exported_by is None else best_evaluation_of(config) or early_stopping_of(config)


def _direction(asked: EarlyStoppingConfig | KeepBestConfig) -> Literal["min", "max"]:
    """Return the direction of a metric; a configuration has replaced `auto`."""
    return "max" if asked.mode == "max" else "min"
