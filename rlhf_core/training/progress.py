"""The progress bar: loss, tokens a second and time left, on stderr, where there is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rlhf_core.infra.log import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressBar:
    """Shows how far a run is; without a terminal, or where it isn't wanted, it does nothing."""

    def __init__(self, *, wanted: bool, total_steps: int | None, step: int = 0) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if wanted and console().is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]} · {task.fields[speed]} tokens/s ·"),
                TimeRemainingColumn(),
                console=console(),
                transient=True,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=step, loss="–", speed="–")

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, loss=f"{loss:.4f}", speed=f"{tokens_per_second:,.0f}")
