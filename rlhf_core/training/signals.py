"""SIGTERM as a flag: the run goes on to the end of its step, saves, and only then stops.

The flag is looked at before the first step and after each one that may be saved. Loading, an evaluation and a step come to
their end first, and after the last step so do the final evaluation and the export: then the run ends as done.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

from rlhf_core.errors import Stopped


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


def stopped(step: int, output: Path | None) -> Stopped:
    """Return the end of a run that was asked to stop after `step`, whose state is saved where there is an `output`."""
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
