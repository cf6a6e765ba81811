"""A time limit for a call, whether it waits for a network, loops, or evaluates a regular expression without end.

What exceeded its limit may have left threads that never end, as may what started some of its own; `leave` exits all the same.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class TimeLimit(Exception):
    """A call exceeded its time limit; the text says where it was then (`file.py:12 in score`), or is empty."""

    ever = False
    """Whether any call of this process exceeded its limit, so that threads which never end may be left."""

    def __init__(self, where: str = "") -> None:
        super().__init__(where)
        TimeLimit.ever = True


class _TimeIsUp(BaseException):
    """Raised inside the call to end it; no `Exception`, for code that catches all of those would catch it."""


def call_within(seconds: float | None, function: Callable[[], T]) -> T:
    """Call a function under a time limit; return its result, or raise what it raises.

    In the main thread a signal ends the call, wherever it is. (Measured: a thread can't be abandoned while a regular expression
    or a power of integers holds the interpreter's lock, and one that is abandoned inside torch aborts the process at exit.) The
    signal is SIGVTALRM, so that the call itself may use alarms. In other threads, and on Windows, the call runs in a new thread,
    which is abandoned at the limit.

    Args:
        seconds: the limit; None for none.
        function: takes no arguments.

    Raises:
        TimeLimit: the call took longer.
    """
    if seconds is None:
        return function()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _by_signal(seconds, function)
    return _in_thread(seconds, function)


def _by_signal(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in the main thread, and end it by SIGVTALRM at the limit."""
    end = time.monotonic() + seconds
    running = True

    def look(number: int, frame: FrameType | None) -> None:
        nonlocal end
        inside = frame is None or frame.f_code is not _by_signal.__code__  # else the call hasn't begun, or has ended
        if running and inside and time.monotonic() >= end:
            # Timer and reminder may fire together: the second must not raise while the first's exception ends the call.
            end = time.monotonic() + _AGAIN / 2
            raise _TimeIsUp

    handler = signal.signal(signal.SIGVTALRM, look)
    # The timer counts processor time, which code that holds the interpreter's lock uses; a thread interrupts code that waits.
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN)
    done = threading.Event()
    reminder = threading.Thread(target=_remind, args=(done, seconds), name="time limit", daemon=True)
    try:
        reminder.start()
        return function()
    except _TimeIsUp as error:
        raise TimeLimit(where_raised(error.__traceback__)) from error
    finally:
        running = False
        done.set()
        reminder.join()  # its signal would end the process once the handler is removed
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)


_CORE = Path(__file__).parents[1]
_AGAIN = 1.0
"""Seconds between further signals to a call that caught the first one and continues."""


def _remind(done: threading.Event, seconds: float) -> None:
    """Signal the main thread after `seconds` and again every `_AGAIN` seconds, until `done` is set."""
    wait = seconds
    while not done.wait(wait):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGVTALRM)  # type: ignore[arg-type]
        wait = _AGAIN


def where_raised(trace: TracebackType | None) -> str:
    """Return the innermost line of a traceback outside libraries and the core, as `file.py:12 in score`; '' without one."""
    lines = []
    while trace is not None:
        lines.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return _innermost(lines)


def where_thread_is(thread: int | None) -> str:
    """Return the line that a thread runs now, outside libraries and the core, as `file.py:12 in score`; '' if there is none.

    Args:
        thread: its `threading.get_ident()`.
    """
    frame = sys._current_frames().get(thread or 0)
    lines = []
    while frame is not None:
        lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return _innermost(reversed(lines))


def _innermost(lines: Iterable[tuple[CodeType, int]]) -> str:
    """Return the last of a stack's lines, outermost first, that is outside libraries and the core."""
    found = ""
    others = {"site-packages", f"python{sys.version_info[0]}.{sys.version_info[1]}"}
    for code, line in lines:
        path = Path(code.co_filename)
        if not others & set(path.parts) and _CORE not in path.parents:
            found = f"{path.name}:{line} in {code.co_name}"
    return found


def _in_thread(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a new thread, with this one's context variables and CUDA device."""
    outcome: dict[str, Any] = {}
    done = threading.Event()
    inherited = inheriting(function)

    def serve() -> None:
        try:
            outcome["result"] = inherited()
        except BaseException as error:
            outcome["error"] = error
        done.set()

    thread = threading.Thread(target=serve, name="time limit", daemon=True)
    thread.start()
    if not done.wait(seconds):
        raise TimeLimit(where_thread_is(thread.ident))
    if "error" in outcome:
        raise outcome.pop("error")
    return outcome["result"]


def inheriting(function: Callable[[], T]) -> Callable[[], T]:
    """Return a function that calls `function` in another thread, with this one's context variables and CUDA device."""
    context, device = contextvars.copy_context(), _cuda_device()

    def call() -> T:
        if device is not None:  # a new thread starts with the first device
            sys.modules["torch"].cuda.set_device(device)
        return context.run(function)

    return call


_noted: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@contextlib.contextmanager
def noting_threads() -> Iterator[None]:
    """Note the threads that begin inside and that Python's exit would wait for, such as a reward's."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        _noted.update(one for one in threading.enumerate() if not one.daemon and one not in before)


def exit_may_hang() -> bool:
    """Return whether Python's own exit may wait for ever: a call exceeded its limit, or a thread that was noted still runs."""
    return TimeLimit.ever or any(thread.is_alive() for thread in list(_noted))


def leave(code: int) -> NoReturn:
    """Exit this process with `code` at once, also where threads hang: Python's own exit waits for all but daemon threads.

    What is registered with `atexit` runs, for at most 10 seconds, and the standard streams are flushed.
    """
    with contextlib.suppress(TimeLimit):
        _in_thread(10.0, atexit._run_exitfuncs)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _cuda_device() -> int | None:
    """Return the number of this thread's CUDA device; None where CUDA isn't in use."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None
