"""What a run of a training stage came to: its last metrics, its first and last evaluation, and the gain in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.infra.files import read_json
from rlhf_core.training.logger import is_timing

_TELLING = ("eval_reward", "eval_accuracy", "eval_loss", "reward", "accuracy", "loss")
"""Metrics, the one that tells most of a gain first."""


def run_metrics(directory: Path) -> dict[str, Any]:
    """Return a run's figures as JSON values: `step`, `tokens`, `seconds`, and the `first` and `last` metrics.

    The first evaluation is the one before the first step, where there is one.
    """
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    tokens = seconds = 0.0
    for row in read_rows(directory / "metrics.jsonl"):
        tokens += row.get("tokens", 0)
        seconds += row.get("seconds", 0)
        numbers = {name: value for name, value in row.items() if _is_result(name, value)}
        first, last = {**numbers, **first}, {**last, **numbers}
    evaluations = {
        event["step"]: event["metrics"]
        for event in read_rows(directory / "events.jsonl")
        if event["event"] == "evaluated"
    }
    if evaluations:
        last |= evaluations[max(evaluations)]
        if len(evaluations) > 1:
            first |= evaluations[min(evaluations)]
    step = read_json(directory / "run.json").get("step")
    return {"step": step, "tokens": int(tokens), "seconds": seconds, "first": first, "last": last}


def _is_result(name: str, value: Any) -> bool:
    """Tell whether a figure of a step is one of the training itself: no time, and no evaluation, which has events of its own."""
    return isinstance(value, int | float) and not is_timing(name) and not name.startswith("eval_")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log; none where there is no such file."""
    # Texts of events may hold other ends of lines, such as U+2028, at which `str.splitlines` would cut a row.
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines if line]


def training_gain(metrics: Mapping[str, Any]) -> str:
    """Return the metric that tells most of what a training gained, from its first to its last value; '' where there is none.

    A metric of training steps, which each see other rows, is followed by its value on the rows held out, where it has one.
    """
    first, last = metrics.get("first", {}), metrics.get("last", {})
    name = next((name for name in _TELLING if name in first and name in last), None)
    if name is None:
        return ""
    begun = f"{first[name]:.4g} → " if first[name] != last[name] else ""
    held_out = last.get(f"eval_{name}")
    return f"{name} {begun}{last[name]:.4g}" + ("" if held_out is None else f", held out {held_out:.4g}")
