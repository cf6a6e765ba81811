"""Metrics as text: the figures of a step, and of an evaluation."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from rlhf_core.training.online_metrics import DETAILS, FIRST

_REWARD = "reward"
_EVALUATED = "eval_"
_DEVIATION, _ERROR = "_std", "_se"


def evaluation_line(metrics: Mapping[str, float]) -> str:
    """Return an evaluation's metrics as one line, the standard error of each behind it: `eval_loss 1.2345 ± 0.0123`."""
    errors = {name: f" ± {metrics[name + _ERROR]:.4f}" for name in metrics if name + _ERROR in metrics}
    shown = _without_spreads(metrics, errors, _ERROR)
    return "  ".join(f"{name} {fixed(metrics[name])}{errors.get(name, '')}" for name in shown)


def step_figures(metrics: Mapping[str, float], hidden: Collection[str] = ()) -> list[str]:
    """Return the metrics of a step, each as text: `margin 0.25`, and with a standard deviation `reward 0.5 (std 0.3)`.

    Those of an evaluation are left out, which has a line of its own, and so are the details of an online step, whose most
    telling metrics come first.

    Args:
        hidden: names of others that are left out.
    """
    deviations = {name: f" (std {metrics[name + _DEVIATION]:.3g})" for name in metrics if name + _DEVIATION in metrics}
    shown = [name for name in _without_spreads(metrics, deviations, _DEVIATION) if name not in hidden]
    shown = [name for name in shown if not name.startswith(_EVALUATED)]
    if _REWARD in metrics:
        parts = [name for name in shown if name.startswith(f"{_REWARD}/")]
        first = [_REWARD, *parts, *(name for name in FIRST if name in shown)]
        shown = list(dict.fromkeys([*first, *(name for name in shown if name not in DETAILS)]))
    return [f"{name} {metrics[name]:.4g}{deviations.get(name, '')}" for name in shown]


def fixed(value: float) -> str:
    """Return a number with four decimals; one that rounds to 0 has no sign."""
    return f"{round(value, 4) + 0.0:.4f}"


def _without_spreads(metrics: Mapping[str, float], spread: Collection[str], suffix: str) -> list[str]:
    """Return the names of metrics, without the spread of those that have one."""
    behind = {name + suffix for name in spread}
    return [name for name in metrics if name not in behind]
