"""Progress on stderr: a bar or a line where there is a terminal; of what has no steps, elsewhere a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rlhf_core.infra.log import console

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress, ProgressColumn, TaskID

log = logging.getLogger(__name__)

LOG_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
REDRAW_EVERY = 0.1
"""Seconds between two drawings of a bar or line that no thread redraws."""


class _Bar:
    """A bar that is shown inside its `with` block; `_bar` is None where there is no terminal, or none is wanted."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def _make(self, *columns: ProgressColumn, **options: Any) -> Progress:
        """Make the bar, of rich's columns and options; it isn't shown yet."""
        from rich.progress import Progress

        self._bar = Progress(*columns, console=console(), transient=True, **options)
        return self._bar

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class StepBar(_Bar):
    """Shows the steps of a training run: how many are done, a figure, tokens per second, the phase and the time left.

    Args:
        wanted: false shows nothing.
        total_steps: steps of the whole run, where that is known.
        step: those that are done already.
    """

    def __init__(self, *, wanted: bool, total_steps: int | None, step: int = 0) -> None:
        super().__init__()
        if wanted and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

            # A bar of 80 columns, of which phases, where there are some, and a long figure take what a narrower bar leaves.
            bar = self._make(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figure]} · {task.fields[speed]} tokens/s{task.fields[phases]}"),
                TimeRemainingColumn(compact=True),
            )
            self._task = bar.add_task("training", total=total_steps, completed=step, figure="–", speed="–", phases="")

    def update(
        self, step: int, figure: str, tokens_per_second: float, shares: Mapping[str, float] | None = None
    ) -> None:
        """Show that a step is done.

        Args:
            figure: what says most of it, such as `loss 0.5`.
            shares: each phase's share of the time so far, where steps have phases.
        """
        if self._bar is not None and self._task is not None:
            phases = "".join(f" {name} {share:.0%}" for name, share in (shares or {}).items())
            self._bar.update(
                self._task,
                completed=step,
                figure=figure,
                speed=f"{tokens_per_second:,.0f}",
                phases=f" ·{phases}" if phases else "",
            )

    def show_phase(self, name: str | None) -> None:
        """Show which phase of a step has begun; None where none has."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=name or "training")


class ByteBar(_Bar):
    """Shows how many bytes are done; it is a progress callback: `bar(done, total)`, both in bytes.

    A smaller `done` than before starts the speed again, as the next trial of a merge does.

    Args:
        what: what is being done, such as `merging`.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        self._done = 0
        self._began: tuple[float, int] | None = None  # when, and with how many bytes
        self._shown = 0.0
        if sys.stderr.isatty():
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            # Redrawn in `__call__`, not by a thread: a process with threads can't be forked.
            self._make(TextColumn("{task.description}"), *columns, auto_refresh=False)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done."""
        if self._bar is None:
            self._log(done, total)
            return
        if self._task is None or done < self._done:  # what was done before a kill has no speed
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(self._what, total=total, completed=done)
        self._done, now = done, time.monotonic()
        due = now - self._shown > REDRAW_EVERY or done >= total
        self._bar.update(self._task, completed=done, total=total, refresh=due)
        self._shown = now if due else self._shown

    def _log(self, done: int, total: int) -> None:
        """Log bytes, speed and time left, where `LOG_EVERY` seconds have passed since the last line."""
        from rich.filesize import decimal

        now = time.monotonic()
        if self._began is None or done < self._done:  # as with the bar
            self._began, self._shown = (now, done), now
        self._done = done
        if now - self._shown < LOG_EVERY or done >= total:
            return
        self._shown = now
        since, first = self._began
        rate = (done - first) / (now - since)
        left = f"{timedelta(seconds=round((total - done) / rate))} left" if rate else "time left unknown"
        log.info("%s: %s of %s, %s/s, %s", self._what, decimal(done), decimal(total), decimal(int(rate)), left)


class RowBar(_Bar):
    """Shows how many rows of prompts are answered, tokens per second, and the time left.

    Args:
        total: rows in all.
        done: rows that were answered before this process began; they have no speed.
    """

    def __init__(self, *, total: int, done: int = 0) -> None:
        super().__init__()
        self._total, self._before, self._done = total, done, done
        self._drawn = self._returned = 0
        self._drawn_for_rows = 0
        """Tokens that were drawn until the last row was answered."""
        self._began = self._shown = time.monotonic()
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

            speed = TextColumn("rows · {task.fields[speed]} tokens/s · {task.fields[left]} left")
            bar = self._make(TextColumn("sampling"), BarColumn(bar_width=20), MofNCompleteColumn(), speed)
            self._task = bar.add_task("sampling", total=total, completed=done, speed="–", left="–")

    def add_tokens(self, count: int) -> None:
        """Note that so many tokens were drawn."""
        self._drawn += count
        self._show()

    def update(self, done: int, tokens: int) -> None:
        """Note how many rows are answered, those of before included, and how many tokens the last one's completions have."""
        self._done, self._drawn_for_rows = done, self._drawn
        self._returned += tokens
        self._show()

    @property
    def tokens_per_second(self) -> float:
        # An engine may not report the tokens that it draws, and a sampler may return a few of those that were drawn.
        return max(self._drawn, self._returned) / max(time.monotonic() - self._began, 1e-9)

    def _show(self) -> None:
        """Show the figures: in the bar at most every `REDRAW_EVERY` seconds, else a log line every `LOG_EVERY`."""
        now = time.monotonic()
        every = REDRAW_EVERY if self._bar is not None else LOG_EVERY
        if now - self._shown < every or self._done >= self._total:
            return
        self._shown = now
        speed, seconds = f"{self.tokens_per_second:,.0f}", self._seconds_left(now)
        left = "–" if seconds is None else str(timedelta(seconds=round(seconds)))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, speed=speed, left=left)
        else:
            log.info("sampling: %d of %d rows, %s tokens/s, %s left", self._done, self._total, speed, left)

    def _seconds_left(self, now: float) -> float | None:
        """Estimate the time left from the tokens that a row took so far, those of rows in progress counted; None at first."""
        answered, elapsed = self._done - self._before, now - self._began
        if not answered:
            return None
        share = answered / (self._total - self._before)
        if self._drawn_for_rows:
            share *= self._drawn / self._drawn_for_rows
        return elapsed * max(1 / share - 1, 0)


class NewsLine:
    """Shows for how long something runs that logs elsewhere, and what is new of it: `[1/9] sft · 38 s · step 120/450 loss 0.2`.

    On a terminal the line is renewed in its place on stderr; elsewhere `tell` is called with it every `LOG_EVERY` seconds.

    Args:
        head: what runs.
        began: when it began, by `time.monotonic`.
        tell: prints a line.
    """

    def __init__(self, head: str, began: float, tell: Callable[[str], None]) -> None:
        self._head, self._began, self._tell = head, began, tell
        self._shown = time.monotonic()
        self._live: Live | None = None

    def show(self, news: str) -> None:
        """Show the line if it is time for it."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._shown < (REDRAW_EVERY if terminal else LOG_EVERY):
            return
        self._shown = now
        seconds = round(now - self._began)
        took = f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
        line = " · ".join(filter(None, (self._head, took, " ".join(news.split()))))
        if terminal:
            self._draw(line)
        else:
            self._tell(line)

    def hide(self) -> None:
        """Take the line from the terminal, as before anything else is printed; `show` brings it back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, line: str) -> None:
        from rich.live import Live
        from rich.text import Text

        text = Text(line, no_wrap=True, overflow="ellipsis")
        if self._live is None:
            # What is printed meanwhile hides the line itself; redirected, stdout would go to the terminal where it is a file.
            apart = {"redirect_stdout": False, "redirect_stderr": False}
            self._live = Live(text, console=console(), transient=True, auto_refresh=False, **apart)  # type: ignore[arg-type]
            self._live.start()
        self._live.update(text, refresh=True)
