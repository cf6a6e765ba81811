"""Samples in trackers: a text per fixed prompt in TensorBoard, a table in the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_core.training.row_log import prompt_text


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return rows of samples as the names and the cells of a table, each reward a column."""
    names = ["step", "row", "prompt", "completion", "stop_reason", "tokens"]
    rewards = list(dict.fromkeys(name for row in rows for name in row.get("rewards", ())))
    scored = ["reward", *(f"reward/{name}" for name in rewards)] if any("reward" in row for row in rows) else []
    cells = []
    for row in rows:
        scores = [row.get("reward"), *(row.get("rewards", {}).get(name) for name in rewards)] if scored else []
        cells.append([*(prompt_text(row[name]) if name == "prompt" else row[name] for name in names), *scores])
    return names + scored, cells


def _log_text(tracker: Any, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Show samples in TensorBoard as Markdown, a text for each fixed prompt, so that its texts stand together over the steps."""
    fixed = [row for row in rows if row["kind"] == "prompt"]
    texts = {
        f"{name} {number}": [row for row in fixed if row["row"] == number]
        for number in {row["row"]: 0 for row in fixed}
    }
    for tag, those in (texts or {name: list(rows)}).items():
        parts = [f"**prompt**\n\n{_as_code(prompt_text(those[0]['prompt']))}"] if fixed else []
        for row in those:
            parts += [] if fixed else [f"**prompt**, row {row['row']}\n\n{_as_code(prompt_text(row['prompt']))}"]
            scores = "".join(f", {key} {value:.4g}" for key, value in row.get("rewards", {}).items())
            total = f", reward {row['reward']:.4g}{scores}" if "reward" in row else ""
            parts.append(f"**completion** ({row['stop_reason']}{total})\n\n{_as_code(row['completion'])}")
        tracker.tracker.add_text(tag, "\n\n".join(parts), global_step=step)
    tracker.tracker.flush()


def _as_code(text: str) -> str:
    """Return a text as a block of Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _log_wandb(tracker: Any, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    columns, cells = _table(rows)
    tracker.log_table(name, columns=columns, data=cells, step=step)


def _log_trackio(tracker: Any, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    import pandas
    import trackio

    columns, cells = _table(rows)
    tracker.log({name: trackio.Table(dataframe=pandas.DataFrame(cells, columns=columns))}, step=step)


LOG_SAMPLES: dict[str, Callable[[Any, str, Sequence[Mapping[str, Any]], int], None]] = {
    "tensorboard": _log_text,
    "wandb": _log_wandb,
    "trackio": _log_trackio,
}
"""Name of a tracker → function (tracker, name, rows, step) that shows samples in it."""
