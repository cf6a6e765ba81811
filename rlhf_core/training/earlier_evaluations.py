"""What a run's own logs say of the evaluations that it has made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole rows of one of a run's logs; none where there is no such file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # half a line, which a kill left
                continue
            if isinstance(row, dict):
                yield row


def earlier_evaluations(output: Path, last: int) -> dict[int, dict[str, float]]:
    """Return the metrics of a run's evaluations by step, up to one of step `last`; of one that was repeated, the later.

    Args:
        output: the run's directory, whose `events.jsonl` has them. One that isn't readable has none.
    """
    found: dict[int, dict[str, float]] = {}
    try:
        for row in whole_rows(output / "events.jsonl"):
            step, metrics = row.get("step"), row.get("metrics")
            if row.get("event") == "evaluated" and type(step) is int and step <= last and isinstance(metrics, dict):
                found[step] = {
                    name: number for name, value in metrics.items() if (number := _number(value)) is not None
                }
    except OSError:
        return {}
    return found


def _number(value: Any) -> float | None:
    """Return a metric of a log as a number, those that aren't finite too, which are there as text; None of anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
