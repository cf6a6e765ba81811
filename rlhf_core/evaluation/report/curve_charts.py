"""The charts of one run, or of two overlaid: which metrics belong together, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rlhf_core.config.online import right_threshold
from rlhf_core.evaluation.report.chart_data import (
    MOST_POINTS,
    Bars,
    Chart,
    Histogram,
    Line,
    LineChart,
    binned,
    edges_of,
    histogram,
)
from rlhf_core.evaluation.report.measured_values import INTERVAL
from rlhf_core.evaluation.report.run_files import MetricCurve, RolloutFigures, RunHistory, is_number
from rlhf_core.infra.errors import ConfigError, did_you_mean
from rlhf_core.training.phases import SECONDS

Runs = Sequence[RunHistory]

_BINNED = (
    f"Of more than {MOST_POINTS} steps each point is the mean over a bin of steps; the band reaches from its least to its largest"
    " value."
)
_SHOWN_BEFORE = ("tokens", "seconds", "tokens_per_second", "learning_rate", "step")


def loss_charts(runs: Runs) -> list[Chart]:
    """Return the charts of the loss with its terms, and of the learning rate."""
    terms = sorted(_names(runs, prefix="loss_"))
    return _existing(
        _chart(runs, "Loss", {"loss": "training"}, evaluated={"eval_loss": "held-out"}),
        _chart(runs, "Loss by term", {name: name.removeprefix("loss_") for name in terms}) if len(terms) > 1 else None,
        _chart(runs, "Learning rate", {"learning_rate": ""}),
    )


def metrics_chart(runs: Runs, metrics: Sequence[str], *, log: bool = False) -> LineChart:
    """Return one chart of metrics by their names, those of evaluations among them; of several runs each has a colour.

    Args:
        log: whether the vertical axis is logarithmic.

    Raises:
        ConfigError: no run has a metric of that name.
    """
    known = {*_names(runs), *(name for run in runs for one in run.evaluations for name in one.metrics)}
    for name in metrics:
        if name not in known:
            fix = did_you_mean(name, known) if known else "wait for the first step"
            raise ConfigError("no metric of that name", place="--metric", got=name, fix=fix)
    names = {name: name for name in metrics}
    chart = _chart(runs, ", ".join(metrics), names, evaluated=names, log=log)
    assert chart is not None
    return chart


def default_metrics(runs: Runs) -> list[str]:
    """Return the metrics that tell most about runs: the reward, or else the loss, and the same of evaluations."""
    names = {*_names(runs), *(name for run in runs for one in run.evaluations for name in one.metrics)}
    wanted = "reward" if "reward" in names else "loss"
    return [name for name in (wanted, f"eval_{wanted}") if name in names]


def reward_charts(runs: Runs) -> list[Chart]:
    """Return the charts of rewards: of rollouts with their parts, and of preference methods."""
    parts = sorted(_names(runs, prefix="reward/"))
    return _existing(
        _chart(runs, "Reward", {"reward": "rollouts"}, evaluated={"eval_reward": "held-out"}),
        _chart(runs, "Reward by part", {name: name.removeprefix("reward/") for name in parts})
        if len(parts) > 1
        else None,
        _chart(runs, "Implicit reward of the responses", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
        _chart(runs, "Reward margin", {"rewards/margin": "training"}, evaluated={"eval_rewards/margin": "held-out"}),
        _chart(runs, "Accuracy", {"accuracy": "training"}, evaluated={"eval_accuracy": "held-out"}),
        _chart(runs, "Explained variance of the values", {"explained_variance": ""}),
    )


def reward_against_kl(runs: Runs) -> list[Chart]:
    """Return the reward over the KL divergence from the reference, each mark a step, joined in their order."""
    lines, wanted = [], "rewards/margin"
    if any("reward" in run.curves for run in runs):
        wanted = "reward"
    thinned = False
    for number, run in enumerate(runs):
        if not {"kl", wanted} <= run.curves.keys():
            continue
        kl = dict(zip(run.curves["kl"].steps, run.curves["kl"].values, strict=True))
        both = [
            (kl[step], value)
            for step, value in zip(run.curves[wanted].steps, run.curves[wanted].values, strict=True)
            if step in kl
        ]
        if len(both) < 2:
            continue
        x, y = [one for one, _ in both], [one for _, one in both]
        if len(both) > MOST_POINTS // 4:
            thinned = True
            x, y = (binned(range(len(both)), values, MOST_POINTS // 4)[1] for values in (x, y))
        name = f"{run.name}: " if len(runs) > 1 else ""
        lines.append(Line(f"{name}steps, in order", x, y, colour=number, marks=True))
        lines.append(Line(f"{name}first step", x[:1], y[:1], colour=number + 3))
    title = f"{'Reward' if wanted == 'reward' else 'Reward margin'} against KL to the reference"
    notes = ("Means over bins of steps.",) if thinned else ()
    return [LineChart(title, lines, "KL, nats", y_label="", notes=notes)] if lines else []


def stability_charts(runs: Runs) -> list[Chart]:
    """Return the charts that show a run getting out of hand: gap, entropy, KL, clipping, ratio, gradient."""
    norms = {name: name.removeprefix("grad_norm_") for name in sorted(_names(runs, prefix="grad_norm_"))}
    return _existing(
        _chart(
            runs, "Gap between engine and trainer", {"logprob_gap": "mean", "logprob_gap_max": "worst completion"},
            y_label="nats per token", log=True,
        ),
        _chart(runs, "Entropy", {"entropy": ""}, y_label="nats per token"),
        _chart(runs, "KL to the reference", {"kl": ""}, y_label="nats"),
        _chart(runs, "KL to the policy that drew", {"kl_sampled": ""}, y_label="nats per token"),
        _chart(
            runs, "Share of clipped tokens",
            {"clipped": "all", "clipped_positive": "advantage > 0", "clipped_negative": "advantage < 0"},
        ),
        _chart(runs, "Probability ratio", {"ratio": "all", "ratio_positive": "advantage > 0", "ratio_negative": "advantage < 0"}),
        _chart(runs, "Gradient norm before clipping", {"grad_norm": "all" if norms else "", **norms}),
    )  # fmt: skip


def signal_charts(runs: Runs) -> list[Chart]:
    """Return the charts of what a rollout can teach: groups, lengths, solve rates, advantages."""
    lengths = {"length_right": "right", "length_wrong": "wrong"}
    if not any(name in run.curves for run in runs for name in lengths):
        lengths = {"length": ""}
    return _existing(
        _chart(runs, "Groups without variance in their rewards", {"groups_without_variance": ""}, y_label="share"),
        _chart(runs, "Length of completions", lengths, y_label="tokens"),
        _chart(runs, "Truncated completions", {"truncated": ""}, y_label="share"),
        *(
            _existing(*(_solve_rates(run, runs) for run in runs), *(_advantages(run, runs) for run in runs))
            if any(run.rollouts for run in runs)
            else ()
        ),
    )


def time_charts(runs: Runs) -> list[Chart]:
    """Return where the time of the steps went, phase by phase, and how fast they were."""
    phases = list(dict.fromkeys(name.removeprefix(SECONDS) for name in _names(runs, prefix=SECONDS)))
    charts: list[Chart | None] = []
    if phases:
        parts = {
            phase: [math.fsum(run.curves[SECONDS + phase].values) if SECONDS + phase in run.curves else 0.0 for run in runs]
            for phase in phases
        }  # fmt: skip
        charts.append(Bars("Time of the steps by phase", [run.name for run in runs], parts, "seconds"))
    charts.append(_chart(runs, "Training speed", {"tokens_per_second": ""}, y_label="tokens/s"))
    speeds = {f"tokens_per_second/{phase}": phase for phase in phases if phase != "update"}
    charts.append(_chart(runs, "Speed of the phases", speeds, y_label="tokens/s"))
    return _existing(*charts)


def further_charts(runs: Runs, shown: Iterable[Chart]) -> list[Chart]:
    """Return a chart of each metric that no other chart shows."""
    known = _NAMES_OF_CHARTS | set(_SHOWN_BEFORE)
    names = [
        name
        for name in sorted(_names(runs))
        if name not in known and not name.startswith(("loss_", "grad_norm_", SECONDS, "tokens_per_second/"))
    ]
    titles = {chart.title for chart in shown}
    # One part alone is the reward itself, which has its chart.
    names = [name for name in names if not (name.startswith("reward/") and "Reward" in titles)]
    return _existing(*(_chart(runs, name, {name: ""}) for name in names))


_NAMES_OF_CHARTS = {
    "loss", "reward", "rewards/chosen", "rewards/rejected", "rewards/margin", "accuracy", "explained_variance", "kl",
    "kl_sampled", "logprob_gap", "logprob_gap_max", "entropy", "clipped", "clipped_positive", "clipped_negative", "ratio",
    "ratio_positive", "ratio_negative", "grad_norm", "groups_without_variance", "length_right", "length_wrong", "truncated",
}  # fmt: skip
"""Metrics that the functions above show."""


def _names(runs: Runs, prefix: str = "") -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.curves if name.startswith(prefix)))


def _existing(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _chart(
    runs: Runs,
    title: str,
    metrics: Mapping[str, str],
    *,
    evaluated: Mapping[str, str] | None = None,
    y_label: str = "",
    log: bool = False,
) -> LineChart | None:
    """Return a chart of metrics over the steps; None where no run has one of them.

    Of one run each metric has a colour; of two each run has one, and each metric a line style.

    Args:
        metrics: name → how the chart calls it. evaluated: those of evaluations.
    """
    lines, thinned = [], False
    for number, run in enumerate(runs):
        found = [(name, label) for name, label in metrics.items() if name in run.curves]
        held_out = [(name, label) for name, label in (evaluated or {}).items() if _evaluated(run, name)]
        for place, (name, label) in enumerate(found):
            line = _line(run.curves[name], _label(run, runs, label if len(found) + len(held_out) > 1 else ""))
            thinned = thinned or line.band is not None
            lines.append(_styled(line, number, place, runs))
        for place, (name, label) in enumerate(held_out, len(found)):
            points = _evaluated(run, name)
            errors = [INTERVAL * error for _, _, error in points]
            line = Line(
                _label(run, runs, label),
                [step for step, _, _ in points],
                [value for _, value, _ in points],
                errors=errors if any(errors) else None,
                marks=True,
            )
            lines.append(_styled(line, number, place, runs))
    notes = (_BINNED,) if thinned else ()
    return LineChart(title, lines, y_label=y_label, log=log, notes=notes) if lines else None


def _line(curve: MetricCurve, label: str) -> Line:
    x, y, band = binned(curve.steps, curve.values)
    return Line(label, x, y, band=band)


def _label(run: RunHistory, runs: Runs, label: str) -> str:
    if len(runs) == 1:
        return label
    return f"{run.name}: {label}" if label else run.name


def _styled(line: Line, run: int, metric: int, runs: Runs) -> Line:
    colour, style = (metric, 0) if len(runs) == 1 else (run, metric)
    return Line(line.label, line.x, line.y, colour, style, line.band, line.errors, line.marks)


def _evaluated(run: RunHistory, name: str) -> list[tuple[int, float, float]]:
    """Return (step, value, standard error) of a metric in the evaluations that have it; an unknown error is 0."""
    return [
        (one.step, one.metrics[name], one.metrics.get(f"{name}_se", 0.0))
        for one in run.evaluations
        if name in one.metrics
    ]


def right_from(run: RunHistory) -> float:
    """Return the reward from which a completion counts as right, as the run counted it."""
    asked = run.options.get("right_from")
    weights = [
        float(one["weight"])
        for one in run.rewards.values()
        if isinstance(one, Mapping) and is_number(one.get("weight"))
    ]
    return right_threshold(float(asked) if is_number(asked) else None, weights or [1.0])


def _halves(rollouts: Sequence[RolloutFigures]) -> dict[str, list[RolloutFigures]]:
    """Return the first and the last third of the rollouts, by their steps; all of them where they are few."""
    steps = sorted({one.step for one in rollouts})
    if len(steps) < 3:
        return {"": list(rollouts)}
    early, late = steps[len(steps) // 3 - 1], steps[-(len(steps) // 3)]
    return {
        "first third": [one for one in rollouts if one.step <= early],
        "last third": [one for one in rollouts if one.step >= late],
    }


def _solve_rates(run: RunHistory, runs: Runs) -> Histogram | None:
    """Return how the share of right completions is distributed over groups."""
    threshold, rates = right_from(run) if run.rollouts else 0.0, dict[str, list[float]]()
    for label, some in _halves(run.rollouts).items():
        groups: dict[tuple[int, int], list[bool]] = {}
        for one in some:
            if one.reward is not None:
                groups.setdefault((one.step, one.place), []).append(one.reward >= threshold)
        rates[label] = [sum(group) / len(group) for group in groups.values() if len(group) > 1]
    if not any(rates.values()):
        return None
    edges = [number / 10 for number in range(11)]
    shares = {label: histogram(values, edges) for label, values in rates.items() if values}
    notes = (f"Of the groups that are kept; right from a reward of {threshold:g}.",)
    return Histogram(
        _titled("Solve rate of groups", run, runs),
        edges,
        shares,
        "right completions of a group",
        "share of groups",
        notes,
    )


def _advantages(run: RunHistory, runs: Runs) -> Histogram | None:
    """Return how advantages are distributed over the completions that were trained on."""
    by_part = {
        label: [one.advantage for one in some if one.advantage is not None]
        for label, some in _halves(run.rollouts).items()
    }
    everything = [value for values in by_part.values() for value in values]
    if not everything:
        return None
    edges = edges_of(everything)
    shares = {label: histogram(values, edges) for label, values in by_part.items() if values}
    notes = ("Of the completions that are kept and were trained on.",)
    return Histogram(
        _titled("Advantage of completions", run, runs), edges, shares, "advantage", "share of completions", notes
    )


def _titled(title: str, run: RunHistory, runs: Runs) -> str:
    return title if len(runs) == 1 else f"{title}: {run.name}"
