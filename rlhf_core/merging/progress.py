"""How far a merge is: bytes, bytes a second and time left, as a bar on a terminal, else as a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from rlhf_core.infra.log import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
REDRAW = 0.1
"""Seconds between two pictures of the bar."""


class ByteBar:
    """Shows how many bytes are done. Calling it tells of bytes done and their total."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._done = 0
        self._began: tuple[float, int] | None = None  # when, and with how many bytes
        self._told = 0.0

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
            # Drawn when told of progress, not by a thread: a process with threads can't be forked.
            self._progress = Progress(*columns, console=console(), transient=True, auto_refresh=False)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            self._log(done, total)
            return
        if self._task is None or done < self._done:  # what was done before a kill has no speed; each trial starts anew
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(self._what, total=total, completed=done)
        self._done, now = done, time.monotonic()
        due = now - self._told > REDRAW or done >= total
        self._progress.update(self._task, completed=done, total=total, refresh=due)
        self._told = now if due else self._told

    def _log(self, done: int, total: int) -> None:
        from rich.filesize import decimal

        now = time.monotonic()
        if self._began is None or done < self._done:  # as with the bar
            self._began, self._told = (now, done), now
        self._done = done
        if now - self._told < EVERY or done >= total:
            return
        self._told = now
        since, first = self._began
        rate = (done - first) / (now - since)
        left = f"{timedelta(seconds=round((total - done) / rate))} left" if rate else "no end in sight"
        log.info("%s: %s of %s, %s/s, %s", self._what, decimal(done), decimal(total), decimal(int(rate)), left)
