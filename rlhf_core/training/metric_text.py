"""Metrics as text: a step in one line, an evaluation as a small table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rlhf_core.training.online_metrics import DETAILS, FIRST

_REWARD = "reward"
_EVALUATED = "eval_"
_DEVIATION, _ERROR = "_std", "_se"
_TELLING = ("loss", "margin", "accuracy")
"""Last parts of the names of metrics that say most, in the order in which they are shown."""
_BETWEEN = "  "


def evaluation_table(
    metrics: Mapping[str, float], step: int, before: Mapping[str, float] | None = None, before_step: int = 0
) -> str:
    """Return an evaluation as a small table: a metric per line, with its standard error and the value of the one before.

    evaluation of step 20             before, step 10
      eval_loss      0.6502                    0.6931
      eval_accuracy  0.7813 ± 0.0521           0.5000

    The details of an online method, which are many, are left to `metrics.jsonl`.

    Args:
        before: the metrics of the evaluation before, where there was one.
        before_step: its step.
    """
    errors = {name: f" ± {metrics[name + _ERROR]:.4f}" for name in metrics if name + _ERROR in metrics}
    names = _telling_first(_without_spreads(metrics, errors, _ERROR))
    if _EVALUATED + _REWARD in metrics:
        names = [name for name in names if name.removeprefix(_EVALUATED) not in DETAILS]
    earlier = {name: fixed(before[name]) for name in names if name in before} if before else {}
    width = max(map(len, names), default=0)
    digits = max((len(fixed(metrics[name])) for name in names), default=0)
    lines = [f"  {name:{width}}{_BETWEEN}{fixed(metrics[name]):>{digits}}{errors.get(name, '')}" for name in names]
    title = f"evaluation of step {step}"
    if earlier:
        column = max(map(len, [title, *lines])) + len(_BETWEEN)
        heading = f"before, step {before_step}"
        size = max(map(len, [*earlier.values(), heading]))
        lines = [
            f"{line:{column}}{earlier.get(name, ''):>{size}}".rstrip() for line, name in zip(lines, names, strict=True)
        ]
        title = f"{title:{column}}{heading:>{size}}"
    return "\n".join([title, *lines])


def step_line(
    row: Mapping[str, float], figures: Sequence[str], total: int | None = None, *, width: int | None = None
) -> str:
    """Return a step's row as one line: which step, and then as many of the figures as fit, from the first on.

    Args:
        figures: texts such as `loss 0.5000`, the most telling one first.
        total: the run's steps, where their number is known.
        width: most characters; None sets no limit.
    """
    line = f"step {row['step']}" + (f"/{total}" if total else "")
    for figure in figures:
        longer = f"{line}{_BETWEEN}{figure}"
        if width is not None and len(longer) > width:
            break
        line = longer
    return line


def row_figures(row: Mapping[str, float], own: Mapping[str, float]) -> list[str]:
    """Return the figures of a step, the most telling ones first: of an online step its reward, else the loss.

    Args:
        row: what every step has: `loss`, `learning_rate`, `grad_norm`, and `tokens_per_second` where it was timed.
        own: the metrics of the method.
    """
    usual = [f"lr {row['learning_rate']:.1e}", f"grad {row['grad_norm']:.3g}"]
    if "tokens_per_second" in row:
        usual.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    loss = f"loss {fixed(row['loss'])}"
    if _REWARD in own:
        return [*step_figures(own), loss, *usual]
    names = _shown(own)
    first = [name for name in names if _rank(name) < len(_TELLING)]
    short = {name: name.rpartition("/")[2] for name in first}
    unique = {name: short[name] for name in first if [*short.values()].count(short[name]) == 1}
    telling = [f"{unique.get(name, name)} {brief(own[name])}" for name in _telling_first(first)]
    return [loss, *telling, *usual, *step_figures(own, hidden=first)]


def step_figures(metrics: Mapping[str, float], hidden: Collection[str] = ()) -> list[str]:
    """Return the metrics of a step, each as text: `margin 0.25`, and with a standard deviation `reward 0.5 (std 0.3)`.

    Those of an evaluation are left out, which has a table of its own, and so are the details of an online step, whose most
    telling metrics come first.

    Args:
        hidden: names of others that are left out.
    """
    deviations = {name: f" (std {metrics[name + _DEVIATION]:.3g})" for name in metrics if name + _DEVIATION in metrics}
    return [f"{name} {metrics[name]:.4g}{deviations.get(name, '')}" for name in _shown(metrics) if name not in hidden]


def _shown(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics that a step's line may have, in their order there."""
    deviations = [name for name in metrics if name + _DEVIATION in metrics]
    shown = [name for name in _without_spreads(metrics, deviations, _DEVIATION) if not name.startswith(_EVALUATED)]
    if _REWARD not in metrics:
        return shown
    parts = [name for name in shown if name.startswith(f"{_REWARD}/")]
    first = [_REWARD, *parts, *(name for name in FIRST if name in shown)]
    return list(dict.fromkeys([*first, *(name for name in shown if name not in DETAILS)]))


def fixed(value: float) -> str:
    """Return a number with four decimals; one that rounds to 0 has no sign."""
    return f"{round(value, 4) + 0.0:.4f}"


def brief(value: float) -> str:
    """Return a number in at most eight characters, as far as it isn't above 99,999: `0.7813`, `-1.25`, `4.9e-05`."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}" if abs(value) < 1e5 else f"{value:.1e}"


def _rank(name: str) -> int:
    """Return a metric's place among `_TELLING`; their number for any other."""
    last = name.removeprefix(_EVALUATED).rpartition("/")[2]
    return _TELLING.index(last) if last in _TELLING else len(_TELLING)


def _telling_first(names: Sequence[str]) -> list[str]:
    """Return the names, those of `_TELLING` before the others."""
    return sorted(names, key=_rank)


def _without_spreads(metrics: Mapping[str, float], spread: Collection[str], suffix: str) -> list[str]:
    """Return the names of metrics, without the spread of those that have one."""
    behind = {name + suffix for name in spread}
    return [name for name in metrics if name not in behind]
