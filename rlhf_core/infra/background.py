"""Calls in a thread of their own, so that one that hangs can be left behind."""

from __future__ import annotations

import contextlib
import contextvars
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_TURN = 0.5
"""Seconds."""


class TimeLimit(Exception):
    """A call took longer than it may."""


@dataclass
class _Call:
    function: Callable[[], Any]
    context: contextvars.Context
    device: int | None
    """The caller's CUDA device, which a new thread doesn't inherit."""
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None


class Background:
    """One thread that runs a call at a time while the caller waits; gradients are off in it.

    What a call keeps in its thread (an event loop, a connection) is there for the next one. The thread is a daemon: a call that
    hangs keeps no process from ending.

    Args:
        name: of the thread, for debuggers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._queue: SimpleQueue[_Call | None] | None = None
        self._end: Callable[[], Any] = lambda: None

    def run(self, function: Callable[[], T], limit: float | None = None) -> T:
        """Call a function and return its result; what it raises is raised here, with its traceback.

        Args:
            limit: seconds that it may take; None sets no bound.

        Raises:
            TimeLimit: it took longer. Its thread is left behind, and the next call gets a new one.
        """
        call = _Call(function, contextvars.copy_context(), _cuda_device())
        self._started().put(call)
        finished = False
        try:
            finished = _wait(call.done, limit)
        finally:
            if not finished:
                self.close()
        if not finished:
            raise TimeLimit
        if call.error is not None:
            try:
                raise call.error
            finally:
                call.error = None  # else the traceback holds this frame, which holds the error
        return call.result

    def close(self) -> None:
        """End the thread once its call returns; the next call starts another."""
        self._end()
        self._queue = None

    def _started(self) -> SimpleQueue[_Call | None]:
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_serve, args=(self._queue,), name=self.name, daemon=True).start()
            self._end = weakref.finalize(self, self._queue.put, None)
        return self._queue


def _wait(done: threading.Event, limit: float | None) -> bool:
    """Wait in short turns: a signal that another thread took is seen between them, so Ctrl-C always interrupts."""
    end = math.inf if limit is None else time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        if done.wait(min(left, _TURN)):
            return True
    return done.is_set()


def _serve(queue: SimpleQueue[_Call | None]) -> None:
    while (call := queue.get()) is not None:
        try:
            with _without_gradients(call.device):
                call.result = call.context.run(call.function)
        except BaseException as error:
            call.error = error
        call.done.set()
        del call  # an idle thread keeps nobody's samples


def _cuda_device() -> int | None:
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None


@contextlib.contextmanager
def _without_gradients(device: int | None) -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    if device is not None:
        torch.cuda.set_device(device)
    with torch.no_grad():
        yield


@contextlib.contextmanager
def as_in_background() -> Iterator[None]:
    """Give a call in the caller's thread what one in a thread of its own has: no gradients, no autocast."""
    torch = sys.modules.get("torch")
    with contextlib.ExitStack() as stack:
        if torch is not None:
            stack.enter_context(torch.no_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        yield
