"""The progress bar of a merge: bytes, bytes a second and time left, on stderr, where there is a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rlhf_core.infra.log import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ByteBar:
    """Shows how many bytes are done; without a terminal it does nothing. Calling it tells of bytes done and their total."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._done = 0

    def __enter__(self) -> ByteBar:
        if sys.stderr.isatty():
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=console(), transient=True)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            return
        if self._task is None or done < self._done:  # what was done before a kill has no speed; each trial starts anew
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(self._what, total=total, completed=done)
        self._progress.update(self._task, completed=done, total=total)
        self._done = done
