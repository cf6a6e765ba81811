"""SIGTERM as a flag: the run goes on to the end of its step, saves, and only then stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """Within this context SIGTERM sets `requested` instead of ending the process.

    SIGINT keeps its meaning (`KeyboardInterrupt`, nothing saved). Signals can only be taken in the main thread; elsewhere the
    context changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: signal._HANDLER = None
        self._installed = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._request)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
