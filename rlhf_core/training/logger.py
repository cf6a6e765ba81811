"""What a run reports: a row of metrics a step, samples, events, lines on the console, a progress bar, and trackers."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.training import LoggingConfig
from rlhf_core.infra.files import replace_file, storage_errors
from rlhf_core.infra.progress import StepBar
from rlhf_core.training.trackers import Trackers

if TYPE_CHECKING:
    from rlhf_core.contracts.reward import Sample
    from rlhf_core.rewards import Scores

log = logging.getLogger(__name__)

REQUIRED = ("step", "loss", "learning_rate", "grad_norm", "tokens")
"""What every row of `metrics.jsonl` holds: the optimiser step (from 1), its loss before the update, its learning rate, the
gradient's 2-norm before clipping, and the real tokens it was computed from, each prompt counted once."""

TIMING = ("seconds", "tokens_per_second")
"""The only values that may differ between a run and the same run killed and resumed."""


_LONGEST = 10_000
"""Characters of a text that `samples.jsonl` keeps at most."""


class TrainingLogger:
    """Writes `metrics.jsonl` (a row a step), `samples.jsonl` (some completions of each rollout) and `events.jsonl` (append-only)
    into a run directory, and tells people.

    Args:
        directory: the run directory; None writes no file.
        config: how often, and to which trackers.
        total_steps: for the progress bar; None where it isn't known.
        step: the step that the run goes on from.
        enabled: False on all processes but the first: then nothing is written or shown.
        settings: the run's settings, for trackers.
    """

    def __init__(
        self,
        directory: str | Path | None,
        config: LoggingConfig | None = None,
        *,
        total_steps: int | None = None,
        step: int = 0,
        enabled: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config or LoggingConfig()
        self.directory = Path(directory) if directory is not None and enabled else None
        self.enabled, self.total_steps = enabled, total_steps
        self._trackers = Trackers(
            self.config.trackers if enabled else (),
            project=self.config.project,
            output=self.directory,
            settings=settings or {},
        )
        self._progress = StepBar(wanted=enabled and self.config.progress, total_steps=total_steps, step=step)
        self._progress.__enter__()
        self._sampled: tuple[tuple[int, bool] | None, int] = (None, 0)
        """The rollout or evaluation that completions were last kept of, and how many."""

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Write a step's row, and show it. Values that aren't finite become null, since JSON has no name for them."""
        if not self.enabled:
            return
        clean = {name: _jsonable(value) for name, value in row.items()}
        self._append("metrics.jsonl", clean)
        self._progress.update(int(row["step"]), float(row["loss"]), float(row.get("tokens_per_second", 0.0)))
        if row["step"] % self.config.every == 0 or row["step"] == self.total_steps:
            log.info("%s", _line(row, self.total_steps))
        self._trackers.log(clean, int(row["step"]))

    def samples(
        self, samples: Sequence[Sample], scores: Scores, *, rows: Sequence[int], step: int, evaluating: bool
    ) -> None:
        """Keep some of the completions that were scored after a step, evenly apart, up to `logging.samples` for each rollout.

        Args:
            rows: each sample's row in its data.
            evaluating: whether they answer held-out prompts.
        """
        of, kept = (step, evaluating), self._sampled[1] if self._sampled[0] == (step, evaluating) else 0
        room = min(self.config.samples - kept, len(samples))
        if self.directory is None or room <= 0:
            return
        for number in (place * len(samples) // room for place in range(room)):
            sample = samples[number]
            row = {"step": step, "evaluating": evaluating, "row": rows[number], "prompt": _cut(sample.prompt)}
            row |= {"completion": _cut(sample.completion), "stop_reason": sample.stop_reason}
            row |= {"reward": float(scores.total[number])}
            row |= {"rewards": {name: values[number] for name, values in scores.by_name.items()}}
            self._append("samples.jsonl", row)
        self._sampled = (of, kept + room)

    def event(self, name: str, **fields: Any) -> None:
        """Append an event, with the time in UTC."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._append("events.jsonl", {"time": now, "event": name, **{k: _jsonable(v) for k, v in fields.items()}})

    def rewind(self, step: int) -> list[int]:
        """Cut `metrics.jsonl` back to the rows up to `step`; what a kill left half written goes too.

        Returns the steps up to there whose rows are missing: damaged, and left out.
        """
        path = self._path("metrics.jsonl")
        if path is None:
            return []
        rows: dict[int, bytes] = {}
        if path.exists():
            rows = {number: line for number, line in self._rows(path) if 0 < number <= step}
            replace_file(path, b"".join(rows.values()))
        return sorted(set(range(1, step + 1)) - rows.keys())

    def rewind_samples(self, step: int, evaluated: int | None) -> None:
        """Cut `samples.jsonl` back to the rollouts before `step` and the evaluations up to `evaluated`: the others come again."""
        path = self._path("samples.jsonl")
        if path is None or not path.exists():
            return

        def stays(line: bytes) -> bool:
            try:
                row = json.loads(line)
                last = (evaluated if evaluated is not None else -1) if row["evaluating"] else step - 1
                return line.endswith(b"\n") and row["step"] <= last
            except (ValueError, LookupError, TypeError, RecursionError):
                return False

        with storage_errors(path):
            lines = path.read_bytes().splitlines(keepends=True)
        replace_file(path, b"".join(line for line in lines if stays(line)))

    def amend(self, row: Mapping[str, Any]) -> None:
        """Replace the row of the last step, in one stroke."""
        path = self._path("metrics.jsonl")
        if path is not None:
            clean = {name: _jsonable(value) for name, value in row.items()}
            earlier = [line for number, line in self._rows(path) if 0 < number < row["step"]]
            replace_file(path, b"".join([*earlier, _encoded(clean)]))
            self._trackers.log(clean, int(row["step"]))

    @staticmethod
    def _rows(path: Path) -> list[tuple[int, bytes]]:
        """Return each line with its step, 0 where it isn't a whole row."""
        with storage_errors(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [(_step_of(line), line) for line in lines]

    def flush(self) -> None:
        """Make the rows written so far durable."""
        for path in (self._path("metrics.jsonl"), self._path("samples.jsonl")):
            if path is not None and path.exists():
                with storage_errors(path), path.open("rb+") as handle:
                    os.fsync(handle.fileno())

    def close(self) -> None:
        """Take the progress bar away and finish the trackers."""
        self._progress.__exit__(None, None, None)
        self._trackers.close()

    def _path(self, name: str) -> Path | None:
        return self.directory / name if self.directory is not None else None

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self._path(name)
        if path is None:
            return
        line = _encoded(row)
        with storage_errors(path, len(line)), path.open("ab+", buffering=0) as handle:
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":
                    # A kill in the middle of a line: the next one must not be glued to it.
                    line = b"\n" + line
            handle.write(line)


def _cut(value: Any) -> Any:
    """Return a text, or the texts of a chat, without what is longer than `_LONGEST` characters."""
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[:_LONGEST]} … [{len(value) - _LONGEST} characters more]"
    if isinstance(value, Mapping):
        return {str(name): _cut(item) for name, item in value.items()}
    return [_cut(item) for item in value] if isinstance(value, list | tuple) else _jsonable(value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _encoded(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _step_of(line: bytes) -> int:
    """Return a row's step, or 0 for a line that isn't a whole row."""
    if not line.endswith(b"\n"):
        return 0
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    whole = isinstance(row, dict) and row.keys() >= set(REQUIRED) and type(row["step"]) is int
    return row["step"] if whole else 0


def _line(row: Mapping[str, Any], total: int | None) -> str:
    head = f"step {row['step']}" + (f"/{total}" if total else "")
    shown = [f"loss {row['loss']:.4f}", f"lr {row['learning_rate']:.2e}", f"grad {row['grad_norm']:.3f}"]
    if "tokens_per_second" in row:
        shown.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    known = {*REQUIRED, *TIMING}
    shown += [
        f"{name} {value:.4g}" for name, value in row.items() if name not in known and isinstance(value, int | float)
    ]
    return "  ".join([head, *shown])
