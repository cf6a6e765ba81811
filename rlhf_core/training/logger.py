"""The log of a run: a row of metrics per step, samples, events, lines on the console, a progress bar, and trackers."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.training import LoggingConfig
from rlhf_core.infra.files import append_lines, as_json_value, fsync_file, replace_file, storage_errors
from rlhf_core.infra.log import message_width
from rlhf_core.infra.progress import StepBar
from rlhf_core.training.metric_text import fixed, row_figures, step_line
from rlhf_core.training.phases import SECONDS, SPEED, Phases
from rlhf_core.training.rollout_log import RolloutLog
from rlhf_core.training.sample_log import SampleLog
from rlhf_core.training.trackers import Trackers

log = logging.getLogger(__name__)

REQUIRED = ("step", "loss", "learning_rate", "grad_norm", "tokens")
"""The keys of every row of `metrics.jsonl`: the optimiser step (from 1), its loss before the update, its learning rate, the
gradient's 2-norm before clipping, and the real tokens it was computed from, each prompt counted once."""

TIMING = ("seconds", "tokens_per_second")
"""The keys of every row that say how fast the step was."""
REWARD_SECONDS = "reward_seconds"
"""How long a step waited for its rewards; with `/NAME` behind it, how long one reward took."""


def without_timing(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics without its times: the rest is the same for a run and the same run killed and resumed."""
    return {name: value for name, value in row.items() if not is_timing(name)}


def is_timing(name: str) -> bool:
    """Tell whether a metric says how long something took."""
    return name in TIMING or name.startswith((REWARD_SECONDS, SECONDS, SPEED))


class TrainingLogger:
    """Writes a run's logs into its directory, and shows them on the console and in trackers.

    The logs are `metrics.jsonl` (a row per step), `samples.jsonl` (what the model says, see `sample_log`), `rollouts.jsonl` (what
    an online method trains on, see `rollout_log`) and `events.jsonl` (append-only).

    Args:
        directory: the run directory; None writes no file.
        config: how often lines are shown, and the trackers.
        total_steps: for the progress bar; None where their number isn't known.
        step: the step that the run starts or resumes from.
        enabled: False on all processes but the first, where nothing is written or shown.
        quiet: show no progress bar.
        options: the options of the run, shown by trackers.
    """

    def __init__(
        self,
        directory: str | Path | None,
        config: LoggingConfig | None = None,
        *,
        total_steps: int | None = None,
        step: int = 0,
        enabled: bool = True,
        quiet: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config or LoggingConfig()
        self.directory = Path(directory) if directory is not None and enabled else None
        self.enabled, self.total_steps = enabled, total_steps
        self._shown: int | None = None
        """The step whose row was shown last."""
        self._trackers = Trackers(
            self.config.trackers if enabled else (),
            project=self.config.project,
            output=self.directory,
            options=options or {},
        )
        self._progress = StepBar(
            wanted=enabled and not quiet and self.config.progress, total_steps=total_steps, step=step
        )
        self._progress.__enter__()
        self.phases = Phases(self._progress.show_phase)
        """The phases of the run's steps, whose shares of the time are shown."""
        self.samples = SampleLog(self.directory, self.config.samples, self._trackers)
        self.rollouts = RolloutLog(self.directory, self.config.rollouts, self.event)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Write a step's row, and show it. Values that aren't finite are written as null, since JSON has no name for them."""
        if not self.enabled:
            return
        clean = {name: as_json_value(value) for name, value in row.items()}
        self._append("metrics.jsonl", clean)
        self.show(row)
        self._trackers.log(clean, int(row["step"]))
        self.samples.show_scored(int(row["step"]))

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a step's row, once: an evaluation, which takes a while, is shown below the step that it follows."""
        if not self.enabled or row["step"] == self._shown:
            return
        self._shown = row["step"]
        speed = float(row.get("tokens_per_second", 0.0))
        figure = f"reward {row['reward']:.4g}" if "reward" in row else f"loss {fixed(row['loss'])}"
        self._progress.update(int(row["step"]), figure, speed, self.phases.shares())
        if row["step"] % self.config.every == 0 or row["step"] == self.total_steps:
            log.info("%s", _line(row, self.total_steps, self.phases.shares()))

    def event(self, name: str, **fields: Any) -> None:
        """Append an event to `events.jsonl`, with the time in UTC."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._append("events.jsonl", {"time": now, "event": name, **{k: as_json_value(v) for k, v in fields.items()}})

    def resume(
        self, step: int, *, evaluated: int | None, sampled: int | None, last_row: Mapping[str, Any], place: int = 0
    ) -> None:
        """Cut the logs back to the checkpoint that the run resumes from; report rows of earlier steps that are damaged.

        Args:
            step: the checkpoint's step; 0 where a run begins.
            evaluated: the step of its last evaluation.
            sampled: the last step at which it completed the fixed prompts.
            last_row: the row of its step, which is written again where it is damaged.
            place: the first place in the run's order of rows that is still to come.
        """
        self.samples.rewind(step, evaluated=evaluated, sampled=sampled)
        self.rollouts.rewind(step, place)
        lost = self.rewind(step)
        if lost[-1:] == [step]:
            self.amend(last_row)
            lost.pop()
        if lost:
            rows = "the row of 1 step is" if len(lost) == 1 else f"the rows of {len(lost)} steps are"
            log.warning("%s: %s damaged and left out: %s", self._path("metrics.jsonl"), rows, _ranges(lost))
            self.event("metrics_damaged", step=step, steps=lost)

    def rewind(self, step: int) -> list[int]:
        """Cut `metrics.jsonl` back to the rows up to `step`, without lines that a kill left half written.

        Returns:
            The steps up to `step` whose rows are damaged, and left out.
        """
        path = self._path("metrics.jsonl")
        if path is None:
            return []
        rows: dict[int, bytes] = {}
        if path.exists():
            rows = {number: line for number, line in self._rows(path) if 0 < number <= step}
            replace_file(path, b"".join(rows.values()))
        return sorted(set(range(1, step + 1)) - rows.keys())

    def amend(self, row: Mapping[str, Any]) -> None:
        """Replace the row of the last step; a kill leaves the old row or the new one."""
        path = self._path("metrics.jsonl")
        if path is not None:
            clean = {name: as_json_value(value) for name, value in row.items()}
            earlier = [line for number, line in self._rows(path) if 0 < number < row["step"]]
            replace_file(path, b"".join([*earlier, f"{_encoded(clean)}\n".encode()]))
            self._trackers.log(clean, int(row["step"]))
            self.samples.show_scored(int(row["step"]))

    @staticmethod
    def _rows(path: Path) -> list[tuple[int, bytes]]:
        """Return each line of the file with its step, 0 where it isn't a whole row."""
        with storage_errors(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [(_step_of(line), line) for line in lines]

    def flush(self) -> None:
        """Flush the rows written so far to the disk, so that they outlive a crash of the machine."""
        path = self._path("metrics.jsonl")
        if path is not None and path.exists():
            with storage_errors(path):
                fsync_file(path)
        self.samples.file.flush()
        self.rollouts.file.flush()

    def close(self) -> None:
        """Remove the progress bar and finish the trackers."""
        self._progress.__exit__(None, None, None)
        self._trackers.close()

    def _path(self, name: str) -> Path | None:
        return self.directory / name if self.directory is not None else None

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to a file of the run directory."""
        if (path := self._path(name)) is not None:
            append_lines(path, [_encoded(row)])


def _encoded(row: Mapping[str, Any]) -> str:
    """Return a row as JSON, without a line break."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


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


def _line(row: Mapping[str, Any], total: int | None, shares: Mapping[str, float]) -> str:
    """Return a step's row as one line for the console, and behind it the shares of phases in the time so far.

    Of an online method, whose steps are long, a log file gets everything.
    """
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and not is_timing(name)}
    figures = row_figures(row, {name: value for name, value in numbers.items() if name not in REQUIRED})
    if shares:
        figures.append("time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    whole = "reward" in row and not sys.stderr.isatty()
    return step_line(row, figures, total, width=None if whole else message_width())


def _ranges(steps: Sequence[int], limit: int = 8) -> str:
    """Return ascending steps as text, consecutive ones as ranges: `1-3, 7`; at most `limit` ranges."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:limit]]
    return ", ".join(shown) + (" …" if len(ranges) > limit else "")
