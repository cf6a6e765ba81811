"""A bound on how long a call may take, whether it waits for a network, loops, or is lost in a regular expression."""

from __future__ import annotations

import contextvars
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class TimeLimit(Exception):
    """A call took longer than it may; the text says where it was."""


class _TimeIsUp(BaseException):
    """Ends a call: no `Exception`, for those are what careless code swallows."""


def call_within(seconds: float | None, function: Callable[[], T]) -> T:
    """Call a function and return its result; what it raises is raised.

    In the main thread a signal ends the call where it stands (measured: a thread that is waited for can't be left while a regular
    expression or a power of integers keeps the interpreter to itself, and one that is left inside torch aborts the process at its
    end). That signal is SIGVTALRM, so the call may set alarms. Elsewhere the call gets a thread, which is left behind.

    Args:
        seconds: that it may take; None sets no bound.

    Raises:
        TimeLimit: it took longer.
    """
    if seconds is None:
        return function()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _by_signal(seconds, function)
    return _in_thread(seconds, function)


def _by_signal(seconds: float, function: Callable[[], T]) -> T:
    end = time.monotonic() + seconds
    running = True

    def look(number: int, frame: FrameType | None) -> None:
        nonlocal end
        inside = frame is None or frame.f_code is not _by_signal.__code__  # else the call has ended, or not begun
        if running and inside and time.monotonic() >= end:
            # The timer and the reminder come together: the second must not take the place of the first while that ends the call.
            end = time.monotonic() + _AGAIN / 2
            raise _TimeIsUp

    handler = signal.signal(signal.SIGVTALRM, look)
    # What keeps the interpreter to itself uses processor time, which the timer counts; what waits is reminded by a thread.
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN)
    done = threading.Event()
    reminder = threading.Thread(target=_remind, args=(done, seconds), name="time limit", daemon=True)
    try:
        reminder.start()
        return function()
    except _TimeIsUp as error:
        raise TimeLimit(_where(error.__traceback__)) from error
    finally:
        running = False
        done.set()
        reminder.join()  # a reminder that came after the handler is gone would end the process
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)


_CORE = Path(__file__).parents[1]
_AGAIN = 1.0
"""Seconds between signals to a call that goes on after the first, having swallowed it."""


def _remind(done: threading.Event, seconds: float) -> None:
    wait = seconds
    while not done.wait(wait):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGVTALRM)  # type: ignore[arg-type]
        wait = _AGAIN


def _where(trace: TracebackType | None) -> str:
    """Return where the call was: its innermost line that is neither a library's nor the core's, as `file:line in function`."""
    found = ""
    others = {"site-packages", f"python{sys.version_info[0]}.{sys.version_info[1]}"}
    while trace is not None:
        path, name = Path(trace.tb_frame.f_code.co_filename), trace.tb_frame.f_code.co_name
        if not others & set(path.parts) and _CORE not in path.parents:
            found = f"{path.name}:{trace.tb_lineno} in {name}"
        trace = trace.tb_next
    return found


def _in_thread(seconds: float, function: Callable[[], T]) -> T:
    outcome: dict[str, Any] = {}
    done = threading.Event()
    context, device = contextvars.copy_context(), _cuda_device()

    def serve() -> None:
        try:
            if device is not None:  # a new thread would have the first device
                sys.modules["torch"].cuda.set_device(device)
            outcome["result"] = context.run(function)
        except BaseException as error:
            outcome["error"] = error
        done.set()

    threading.Thread(target=serve, name="time limit", daemon=True).start()
    if not done.wait(seconds):
        raise TimeLimit("")
    if "error" in outcome:
        raise outcome.pop("error")
    return outcome["result"]


def _cuda_device() -> int | None:
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None
