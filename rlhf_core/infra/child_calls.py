"""Call a function in child processes: a call that hangs, crashes or takes all memory fails alone, also in a worker thread."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_core.infra.child_process import ChildProcess, take_stdio
from rlhf_core.infra.errors import PluginError, describe_error, error_report, reported_error
from rlhf_core.infra.import_object import import_object

_CODE = (
    "import sys, json; given = json.loads(sys.stdin.readline()); sys.path[:] = given.pop('path');"
    "from rlhf_core.infra.child_calls import serve; serve(**given)"
)
_START_SECONDS = 120.0
"""The time limit of a child's start, in which it imports the function's module."""
_GRACE = 1.0
"""Seconds after the time limit at which a call is ended by ending its process, if an exception inside it didn't end it."""
_CLOCK = 10.0
"""How many times the limit of processor time a call may take by the clock: others may use the processors, or the call waits."""
_CALLS_PER_CHILD = 16
"""A further child is started only for this many more calls, since starting it takes about as long as hundreds of short ones."""


@dataclass(frozen=True)
class CallFailure:
    """The outcome of a call that returned nothing: why (`time`, `memory`, `error`, `crash`), and what is known of it."""

    why: str
    text: str = ""


class ChildCalls:
    """Calls a function in child processes, each call under a limit of time and of memory. May be used from several threads.

    In a thread nothing can end a call that holds the interpreter's lock, such as a regular expression or a power of integers;
    here its process is ended and replaced. The children end with this object, and with this process.

    Args:
        function: `package.module:function`. Its arguments and its result are JSON values.
        seconds: the limit of one call in processor time, so that outcomes don't depend on what else the machine does. By the
            clock a call may take ten times as long.
        memory: most bytes of memory that a child may take; None for no limit. Only Linux enforces it.
        processes: most children that work at the same time.
        setup: `package.module:function`, called without arguments and without a limit when a child starts, to import libraries.
    """

    def __init__(
        self, function: str, *, seconds: float, memory: int | None = None, processes: int = 1, setup: str | None = None
    ) -> None:
        self.function, self.seconds, self.memory, self.processes, self.setup = (
            function,
            seconds,
            memory,
            processes,
            setup,
        )
        self._places = threading.BoundedSemaphore(processes)
        self._idle: list[ChildProcess] = []  # its methods take and add one child at a time, from any thread
        weakref.finalize(self, _kill_all, self._idle)

    def start(self) -> None:
        """Start the first child, unless there is one.

        Raises:
            PluginError: no process can be started, or the function can't be imported in it.
        """
        if not self._idle:
            self._idle.append(self._started())

    def close(self) -> None:
        """End the children that are idle. A later call starts new ones."""
        _kill_all(self._idle)

    def __call__(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """Return the function's result for each list of arguments, in order, or the `CallFailure` of a call that failed.

        Raises:
            PluginError: no process can be started, or the function can't be imported in it.
        """
        outcomes: list[Any] = [None] * len(calls)
        left = iter(range(len(calls)))
        workers: list[_Worker] = []
        try:
            # One child at least, as soon as one is free; further ones only where they are free at once.
            for number in range(-(-len(calls) // _CALLS_PER_CHILD)):
                if not self._places.acquire(blocking=number == 0):
                    break
                workers.append(_Worker(self, calls, outcomes, left))
            _run_all(workers)
        finally:
            for worker in workers:
                worker.release(self._idle)
                self._places.release()
        return outcomes

    def _started(self) -> ChildProcess:
        """Return a new child that has imported the function and waits for calls."""
        try:
            child = ChildProcess(_CODE, quiet=True)
        except OSError as error:
            raise PluginError(f"no child process can be started: {error}", place=self.function) from error
        path = [place for place in sys.path if isinstance(place, str)]
        given = {"function": self.function, "seconds": self.seconds, "memory": self.memory, "setup": self.setup}
        child.send({"path": path, **given})
        try:
            line = child.next_line(_START_SECONDS)
        except BaseException:
            child.kill()
            raise
        if line is None:
            ended = child.how_it_ended()
            child.kill()
            raise PluginError(f"the child process doesn't start: {ended}", place=self.function)
        if report := json.loads(line):
            child.kill()
            raise reported_error(report)
        return child


@functools.cache
def shared_calls(
    function: str, *, seconds: float, memory: int | None = None, processes: int = 1, setup: str | None = None
) -> ChildCalls:
    """Return the `ChildCalls` of these arguments that all of this process share, so that each child starts once."""
    return ChildCalls(function, seconds=seconds, memory=memory, processes=processes, setup=setup)


class _Worker:
    """Makes calls in one child, until the calls that all workers share are used up."""

    def __init__(self, calls: ChildCalls, arguments: Sequence[Sequence[Any]], outcomes: list[Any], left: Any) -> None:
        self.calls, self.arguments, self.outcomes, self.left = calls, arguments, outcomes, left
        self.child: ChildProcess | None = None
        with contextlib.suppress(IndexError):
            self.child = calls._idle.pop()
        self.error: BaseException | None = None
        self.stopped = False

    def run(self) -> None:
        for number in self.left:  # an iterator over a range gives each number to one thread
            if self.stopped:
                return
            self.outcomes[number] = self._call(self.arguments[number])

    def run_in_thread(self) -> None:
        """As `run`; what is raised is kept in `error`."""
        try:
            self.run()
        except BaseException as error:
            self.error = error

    def _call(self, arguments: Sequence[Any]) -> Any:
        """Return the result of one call or its failure; a child that it ended, or whose answer may be late, is dropped."""
        if self.child is None:
            self.child = self.calls._started()
        child, line, begin = self.child, None, time.monotonic()
        limit = _CLOCK * self.calls.seconds + 2 * _GRACE
        try:
            child.send(list(arguments))
            line = child.next_line(limit)
        finally:
            if line is None:
                self.child = None
                late = time.monotonic() - begin >= limit
                ended = "" if late else child.how_it_ended()
                child.kill()
        if line is not None:
            found = json.loads(line)
            return CallFailure(*found["failed"]) if "failed" in found else found["result"]
        return CallFailure("time") if late or ended in _ALARMS else CallFailure("crash", ended)

    def release(self, idle: list[ChildProcess]) -> None:
        """Add the child to those that are idle; called once no call is under way."""
        if self.child is not None:
            idle.append(self.child)
            self.child = None


def _run_all(workers: Sequence[_Worker]) -> None:
    """Run the workers, several in threads; an exception in one, or in this thread, ends the others' children and is raised."""
    if len(workers) == 1:
        return workers[0].run()
    threads = [threading.Thread(target=worker.run_in_thread, name="child calls", daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        for worker in workers:
            worker.stopped = True
            if (child := worker.child) is not None:
                child.kill()
        raise
    for worker in workers:
        if worker.error is not None:
            raise worker.error


def _kill_all(children: list[ChildProcess]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            children.pop().kill()


def serve(function: str, seconds: float, memory: int | None, setup: str | None) -> None:
    """Make calls in this child process: read a JSON list of arguments per line, write its outcome, until stdin is closed."""
    requests, answers = take_stdio()

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        found = import_object(function, place=function)
        if setup is not None:
            import_object(setup, place=setup)()
    except Exception as error:
        answer(error_report(error))
        return
    _limit_memory(memory)
    answer({})
    for line in requests:
        arguments = json.loads(line)
        with _ended_after(seconds):
            outcome = _outcome(found, arguments, seconds)
            try:
                text = json.dumps(outcome)
            except (TypeError, ValueError, RecursionError) as error:
                text = json.dumps({"failed": ["error", describe_error(error)]})
        print(text, file=answers, flush=True)


class _TimeIsUp(BaseException):
    """Raised inside a call at its limit; no `Exception`, since the function may catch all of those."""


def _outcome(function: Any, arguments: Iterable[Any], seconds: float) -> dict[str, Any]:
    """Return the outcome of one call as JSON values."""
    try:
        with _raised_after(seconds):
            return {"result": function(*arguments)}
    except _TimeIsUp:
        return {"failed": ["time", ""]}
    except MemoryError:
        return {"failed": ["memory", ""]}
    except (Exception, SystemExit) as error:
        return {"failed": ["error", describe_error(error)]}


_ALARMS = ("SIGALRM", "SIGPROF")
"""The signals by which a child that can't raise an exception at the limit is ended."""


@contextlib.contextmanager
def _raised_after(seconds: float) -> Iterator[None]:
    """Raise `_TimeIsUp` in what runs inside once it has used this much processor time."""
    if not hasattr(signal, "setitimer"):  # Windows, where the parent ends the process
        yield
        return

    running = True

    def raise_in_call(number: int, frame: FrameType | None) -> None:
        if running:
            raise _TimeIsUp

    signal.signal(signal.SIGVTALRM, raise_in_call)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Have the system end this process if what runs inside takes much longer, also where it never returns to the interpreter."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    timers = {signal.ITIMER_PROF: seconds + _GRACE, signal.ITIMER_REAL: _CLOCK * seconds + _GRACE}
    for name in _ALARMS:
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    for timer, limit in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)


def _limit_memory(most: int | None) -> None:
    """Let this process have no more than `most` bytes of address space beyond what it has now, where the system enforces it."""
    if most is None or not sys.platform.startswith("linux"):
        return
    import resource

    now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + most if hard == resource.RLIM_INFINITY else min(now + most, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
