"""SIGTERM and Ctrl-C as requests to stop: the run finishes its step, saves it and stops; a second Ctrl-C stops at once.

The request is a flag that the loop reads between its steps, where all processes agree on it. While there is no step to finish
(loading, tokenising, evaluation, export), the request is met at once instead: `StopNow` is raised where the run happens to be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

from rlhf_core.infra.errors import Stopped

_ALL = frozenset({signal.SIGTERM, signal.SIGINT})
_ASKED = {
    signal.SIGINT: "Ctrl-C: the run finishes this step, saves it and stops; press Ctrl-C again to stop at once, unsaved",
    signal.SIGTERM: "SIGTERM: the run finishes this step, saves it and stops",
}


class StopNow(KeyboardInterrupt):
    """Raised by a request to stop in code that may be interrupted anywhere."""


class StopSignal:
    """Within this context SIGTERM and the first SIGINT are requests; a second SIGINT is a `KeyboardInterrupt`.

    Python handles signals in the main thread alone; elsewhere the context changes nothing. Where SIGINT is ignored, as in a
    background job, it stays ignored.

    Args:
        speak: whether this process reports a request on stderr.
    """

    def __init__(self, *, speak: bool = True) -> None:
        """Prepare to note requests to stop; handlers are set on entering the context."""
        self.requested: signal.Signals | None = None
        """The signal of the first request."""
        self._speak = speak
        self._at_once: frozenset[signal.Signals] = frozenset()
        """Signals that raise `StopNow` as they come, instead of waiting for the end of the step."""
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        """The handlers to restore."""

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in sorted(_ALL):
                if number == signal.SIGTERM or signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def at_once(self, *signals: signal.Signals) -> Iterator[None]:
        """Raise `StopNow` as soon as one of these signals comes, or has come; of both where none is named."""
        outer, self._at_once = self._at_once, frozenset(signals) or _ALL
        try:
            if self.requested in self._at_once:
                raise StopNow
            yield
        finally:
            self._at_once = outer

    def _request(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: raise, or keep it as the request and report it."""
        asked = signal.Signals(number)
        again, self.requested = self.requested is not None, self.requested or asked
        if asked in self._at_once:
            raise StopNow
        if again and asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self._speak and not again:
            # Not through a logger, which the signal may have interrupted in the middle of a line.
            with contextlib.suppress(OSError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{_ASKED[asked]}\n".encode())


def stopped(step: int, output: Path | None, *, resuming: bool = False) -> Stopped:
    """Return the error of a run that was asked to stop after `step`; its state is saved where it has an `output`.

    Args:
        resuming: whether it was to be resumed, and hadn't read its checkpoint yet.
    """
    if resuming:
        problem = "stopped before it had resumed; its checkpoints are as they were"
        return Stopped(problem, place=str(output), fix="continue with `--resume`")
    if not step:
        fix = "begin again with `--resume`" if output is not None else "begin again"
        return Stopped(
            "stopped before the first step; nothing is saved",
            place=str(output) if output is not None else None,
            fix=fix,
        )
    if output is None:
        return Stopped(f"stopped after step {step}; nothing is saved", fix="set `output` to be able to continue")
    return Stopped(f"stopped after step {step}; its state is saved", place=str(output), fix="continue with `--resume`")
