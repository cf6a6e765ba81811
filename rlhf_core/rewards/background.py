"""What rewards run in beside the main thread: daemon threads, an event loop, and a watch over the interpreter's lock."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from rlhf_core.infra.time_limit import inheriting

GRACE = 30.0
"""Seconds beyond a reward's time limit after which a process whose threads can't run at all is ended."""


class DaemonPool:
    """A few threads that call functions, first in first out, and never keep the process alive.

    Those of `concurrent.futures` do: Python joins them at exit, so a reward that hangs in one would hang the process.

    Args:
        count: most threads.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name, self._threads = count, name, 0
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        weakref.finalize(self, _dismiss, self._waiting, count)

    def submit(self, function: Callable[[], None]) -> None:
        """Call a function, which must not raise, in one of the threads, with this thread's CUDA device and context variables."""
        if self._threads < self._count:
            self._threads += 1
            threading.Thread(target=_serve, args=(self._waiting,), name=self._name, daemon=True).start()
        self._waiting.put(inheriting(function))


def _serve(waiting: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (function := waiting.get()) is not None:
        function()
        del function  # holds samples


def _dismiss(waiting: queue.SimpleQueue[Callable[[], None] | None], count: int) -> None:
    for _ in range(count):
        waiting.put(None)


_owner: contextvars.ContextVar[Any] = contextvars.ContextVar("owner", default=None)


class EventLoopThread:
    """An event loop in a daemon thread. It remembers for which owner each task runs, those that a task starts included."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._owners: weakref.WeakKeyDictionary[asyncio.Task[Any], Any] = weakref.WeakKeyDictionary()
        self.loop.set_task_factory(self._task)
        self.thread = threading.Thread(target=self._run, name="async rewards", daemon=True)
        self.thread.start()

    def start(self, coroutines: list[tuple[Any, Coroutine[Any, Any, None]]]) -> None:
        """Start coroutines, each for its owner. They must not raise; `cancel` ends those of an owner."""

        def begin() -> None:
            for owner, coroutine in coroutines:
                context = contextvars.copy_context()
                context.run(_owner.set, owner)
                self.loop.create_task(coroutine, context=context)

        self.loop.call_soon_threadsafe(begin, context=contextvars.copy_context())

    def owner(self) -> Any:
        """Return the owner of the task that runs at this moment, or blocks the loop; None between tasks."""
        task = asyncio.current_task(self.loop)
        return None if task is None else self._owners.get(task)

    def cancel(self, owner: Any) -> None:
        """Cancel an owner's tasks."""

        def end() -> None:
            for task, of in list(self._owners.items()):
                if of is owner:
                    task.cancel()

        self.loop.call_soon_threadsafe(end)

    def _task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        context = options.get("context")
        self._owners[task] = _owner.get() if context is None else context.get(_owner)
        return task

    def _run(self) -> None:
        if "torch" in sys.modules:
            sys.modules["torch"].set_grad_enabled(False)  # of this thread alone
        self.loop.run_forever()


_loops: dict[int | None, EventLoopThread] = {}


def event_loop() -> EventLoopThread:
    """Return the event loop of all async rewards, kept so that a client that one of them opened works in its next call.

    For a caller on that loop it is another one, which the caller can wait for.
    """
    here = threading.get_ident()
    key = here if any(one.thread.ident == here for one in _loops.values()) else None
    if key not in _loops:
        _loops[key] = EventLoopThread()
    return _loops[key]


def forget_event_loop(blocked: EventLoopThread) -> None:
    """Give up an event loop that something blocks: the next async reward gets a new one."""
    for key in [key for key, one in _loops.items() if one is blocked]:
        del _loops[key]


def awaited(value: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, which runs on the event loop of async rewards while this thread waits."""

    async def wait() -> Any:
        return await value

    future = asyncio.run_coroutine_threadsafe(wait(), event_loop().loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


_ENDS_SILENT_PARENT = """
import os, select, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
parent, silent, limit = int(sys.argv[1]), 0, float(sys.argv[2])
while os.getppid() == parent:
    if select.select([0], [], [], 1.0)[0]:
        reports = os.read(0, 65536)
        if not reports:
            break
        silent, limit = 0, float(reports.split()[-1])
        continue
    try:
        with open(f"/proc/{parent}/stat") as file:
            stopped = file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # not Linux
        stopped = False
    silent += not stopped
    if silent > limit:
        os.kill(parent, signal.SIGABRT)
        break
"""
"""What the child of a `LockWatch` runs; its arguments are the parent's process id, and the first report."""


class LockWatch:
    """Ends the process where a reward holds the interpreter's lock for good, as a regular expression in a thread may.

    No thread can interrupt that, nor raise an error. So a thread reports each second to a small child process that Python code
    runs here. Where no report comes for the longest time limit and `GRACE`, the child sends SIGABRT: `faulthandler` writes where
    each thread is, and the process ends. The child counts seconds itself, and none in which this process is stopped (Ctrl-Z, a
    scheduler): a timer in this process would be due as soon as it continues, before any thread could put it off.
    """

    def __init__(self) -> None:
        self._limits: list[float] = []
        """Time limits of the calls that run, in seconds."""
        self._changed = threading.Condition()
        self._running = False
        self._child: subprocess.Popen[bytes] | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Watch a fork of the process by a thread and a child of its own: reports to the other child are the parent's alone."""
        self._limits, self._changed = [], threading.Condition()
        self._running, self._child = False, None

    @contextlib.contextmanager
    def over(self, seconds: float | None) -> Iterator[None]:
        """Watch while a call with this time limit runs outside the main thread; one without a limit isn't watched."""
        if seconds is None:
            yield
            return
        with self._changed:
            self._limits.append(seconds)
            if seconds == max(self._limits):  # now, since the call may hold the lock before the thread runs
                self._report(seconds + GRACE)
            if not self._running:
                self._running = True
                threading.Thread(target=self._watch, name="lock watch", daemon=True).start()
        try:
            yield
        finally:
            with self._changed:
                self._limits.remove(seconds)
                if not self._limits and self._child is not None:
                    # Now: where the thread slept through a short call, it wouldn't take that call's limit back.
                    self._report(float("inf"))
                self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                if not self._limits:
                    self._report(float("inf"))
                    if not self._changed.wait_for(lambda: bool(self._limits), timeout=60.0):
                        self._running = False
                        self._dismiss_child()
                        return
                self._report(max(self._limits) + GRACE)
                self._changed.wait_for(lambda: not self._limits, timeout=1.0)

    def _report(self, seconds: float) -> None:
        """Tell the child that Python code runs here, and after how many seconds without a report it ends this process.

        The caller holds `_changed`.
        """
        # Where no process can be started, or it was killed just now, the next report starts one.
        with contextlib.suppress(OSError):
            if self._child is None or self._child.poll() is not None:
                if not faulthandler.is_enabled():
                    with contextlib.suppress(ValueError):  # without stderr there is nowhere to write to
                        faulthandler.enable(file=2)
                self._dismiss_child()
                # In this process group, so that Ctrl-Z stops both.
                command = [sys.executable, "-I", "-S", "-c", _ENDS_SILENT_PARENT, str(os.getpid()), str(seconds)]
                quiet = subprocess.DEVNULL
                self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, bufsize=0)
                assert self._child.stdin is not None
                os.set_blocking(self._child.stdin.fileno(), False)  # a child that is stopped keeps nothing waiting
            assert self._child.stdin is not None
            self._child.stdin.write(f"{seconds}\n".encode())

    def _dismiss_child(self) -> None:
        """End the child."""
        if self._child is not None:
            assert self._child.stdin is not None
            self._child.kill()  # at the end of its stdin it ends as well, but a fork of this process may hold that open
            self._child.wait()
            self._child.stdin.close()
            self._child = None
