"""Early stopping: ends a run when a metric of its evaluations no longer improves, or its policy is too far from the reference."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import EarlyStoppingConfig, TrainerConfig
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
        log.info(
            "step %d: stopped early: the running mean of the KL to the reference is %.4g, above `kl_budget` %.4g",
            step,
            self.mean,
            self.most,
        )
        notify("early_stopped", step=step, metric="kl_mean", value=self.mean, budget=self.most)

    def state_dict(self) -> dict[str, str]:
        """Return the mean as JSON values."""
        return {"mean": repr(self.mean)}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Restore what `state_dict` returned."""
        self.mean = float(state["mean"])


class EarlyStopping:
    """Watches one metric; stops after `patience` evaluations in a row without improvement.

    Args:
        metric: its name in an evaluation, such as `eval_loss`.
        mode: whether smaller (`min`) or larger (`max`) is better.
        patience: evaluations in a row without improvement after which it stops.
        min_delta: an improvement is a change by more than this.
    """

    def __init__(
        self,
        metric: str = "eval_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        self.metric, self.mode, self.patience, self.min_delta = metric, mode, patience, min_delta
        self.start: float | None = None
        """The metric before the first step; None where it wasn't evaluated or finite."""
        self.best: float | None = None
        """The best finite value so far, after the first step."""
        self.best_step = 0
        self.best_metrics: dict[str, float] = {}
        """All metrics of the best evaluation."""
        self.waited = 0
        """Evaluations in a row without improvement."""

    @classmethod
    def create(cls, config: EarlyStoppingConfig) -> EarlyStopping:
        """Return early stopping under the options of a configuration."""
        return cls(config.metric, config.mode, config.patience, config.min_delta)

    def describe(self) -> str:
        """Return the best value and its step as text."""
        if self.best is None:
            return f"`{self.metric}` was never finite"
        return f"`{self.metric}` was best at step {self.best_step}: {self.best:.6g}"

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience

    def check(self, metrics: Mapping[str, float]) -> None:
        """Refuse an evaluation without the watched metric.

        Raises:
            ConfigError: names the metric with the nearest name.
        """
        if self.metric not in metrics:
            raise ConfigError(
                f"evaluation gives no metric `{self.metric}`",
                place="early_stopping.metric",
                fix=did_you_mean(self.metric, metrics),
            )

    def update(self, metrics: Mapping[str, float], step: int) -> bool:
        """Compare the metrics of an evaluation after `step`, which `check` accepts, with the best; return whether to stop.

        Those of step 0 are the start, which isn't compared.
        """
        value = float(metrics[self.metric])
        if step == 0:
            self.start = value if math.isfinite(value) else None
        elif self._improves(value):
            self.best, self.best_step, self.best_metrics, self.waited = value, step, dict(metrics), 0
        else:
            self.waited += 1
        return self.stopped

    @property
    def never_improved(self) -> bool:
        """Whether the model was evaluated before the first step, and never better afterwards."""
        if self.start is None or self.best is None:
            return False
        return self.best >= self.start if self.mode == "min" else self.best <= self.start

    def _improves(self, value: float) -> bool:
        """Return whether a value is better than the best so far by more than `min_delta`; one that isn't finite never is."""
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its step and metrics, the start and the count of evaluations since, as JSON values."""
        found = {"start": self.start, "best": self.best, "best_step": self.best_step, "waited": self.waited}
        return {**found, "best_metrics": metrics_as_text(self.best_metrics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.start, self.best = state["start"], state["best"]
        self.best_step, self.waited = int(state["best_step"]), int(state["waited"])
        self.best_metrics = metrics_from_text(state["best_metrics"])
