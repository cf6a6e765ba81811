"""Call a function with many arguments in forked processes, and take the results in the order of the arguments.

Forked processes begin with all that is open and imported here, so nothing is loaded again, and share its memory until they write
to it. What a call changes in Python's objects stays in its process: the function returns what is needed.

Each process has a pipe of its own, and nothing here is shared between processes or done by a thread: one that is killed, at any
moment, ends its own calls and holds nobody up. (The pools of the standard library share a pipe for results. A process that dies
while it writes to it leaves the rest waiting for ever.)
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from rlhf_core.infra.child_process import end_with_parent

log = logging.getLogger(__name__)

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_AHEAD = 2
"""Calls per process that are handed out before a result is waited for: one that runs, and one that it finds when that is done."""
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def may_fork() -> bool:
    """Tell whether this process may be forked: a lock that another thread held would stay held for ever.

    Python's threads are counted. Those of BLAS and OpenMP, which wait for work, are not: the libraries see to them at a fork.
    """
    return sys.platform == "linux" and threading.active_count() == 1 and not multiprocessing.current_process().daemon


def usable_processors() -> int:
    """Return how many processors this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(eq=False)
class _Call:
    """One argument, and what became of it."""

    argument: Any
    child: _Child | None = None
    """Where it runs; None once it has ended, or was never handed out."""
    result: Any = None
    """None, too, of a call that failed."""


@dataclass(eq=False)
class _Child:
    """A forked process."""

    process: ForkProcess
    pipe: Connection
    calls: deque[_Call] = field(default_factory=deque)
    """Handed out and not ended, in the order in which it does them."""


def forked_calls(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], processes: int
) -> Generator[tuple[Argument, Result | None]]:
    """Yield each argument with the result of its call, in order; None in place of a result for a call that failed.

    A call fails where it raises, where its argument or result can't be pickled, and where its process ends. The caller can repeat
    it here, to see the error or to get the result. An error of `arguments` is raised once the results before it were taken.
    Close the iterator where it isn't taken to its end.

    Args:
        function: what is called, in a process without SIGINT, whose default SIGTERM ends it.
        processes: how many there are, at least one; they end with this process.
    """
    waiting: deque[_Call] = deque()
    error: BaseException | None = None
    with _forked(function, processes) as children:
        items = iter(arguments)
        while error is None or waiting:
            if error is None and len(waiting) < _AHEAD * processes:
                try:
                    argument = next(items)
                except StopIteration as end:
                    error = end
                except Exception as raised:
                    error = raised
                else:
                    waiting.append(_handed_out(argument, children))
                continue
            call = waiting.popleft()
            while call.child is not None:
                _take_results(children)
            yield call.argument, call.result
    if not isinstance(error, StopIteration):
        raise error


@contextlib.contextmanager
def _forked(function: Callable[[Any], Any], processes: int) -> Iterator[list[_Child]]:
    """Fork processes, and end them with the context: in their own time at its end, at once where an error ends it."""
    children: list[_Child] = []
    context = multiprocessing.get_context("fork")
    # A signal that reached them before they have set their handlers would be answered as by this process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            inherited = [child.pipe for child in children] + [ours]
            process = context.Process(target=_serve, args=(os.getpid(), function, theirs, inherited), daemon=True)
            try:
                process.start()
            except OSError as problem:
                log.debug("no process is forked: %s", problem)
                break
            theirs.close()  # so that its end is seen here
            children.append(_Child(process, ours))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    everyone = list(children)
    try:
        yield children
    except BaseException:
        # Calls that are handed out would be waited for: whoever stops a run may not wait as long.
        for child in everyone:
            child.process.kill()
        raise
    finally:
        for child in everyone:
            child.pipe.close()
            child.process.join()
            child.process.close()


def _handed_out(argument: Any, children: list[_Child]) -> _Call:
    """Hand a call to the process that has fewest; where it can't be, or no process is left, it has failed."""
    call = _Call(argument)
    try:
        message = ForkingPickler.dumps(argument)
    except Exception as error:
        log.debug("an argument can't be handed out: %s", error)
        return call
    while children and call.child is None:
        child = min(children, key=lambda one: len(one.calls))
        try:
            child.pipe.send_bytes(message)
        except OSError:
            _end(child, children)
        else:
            call.child = child
            child.calls.append(call)
    return call


def _take_results(children: list[_Child]) -> None:
    """Wait until a process has a result, or ends; take what is there."""
    by_pipe = {child.pipe: child for child in children}
    for pipe in wait(list(by_pipe)):
        child = by_pipe[pipe]  # type: ignore[index]
        try:
            done, result = pickle.loads(child.pipe.recv_bytes())
        except (EOFError, OSError):
            _end(child, children)
            continue
        call = child.calls.popleft()
        call.child = None
        if done:
            call.result = result
        else:
            log.debug("a call failed in its process: %s", result)


def _end(child: _Child, children: list[_Child]) -> None:
    """Take note that a process has ended: its calls have failed."""
    log.debug("a process for calls has ended with %d calls", len(child.calls))
    children.remove(child)
    for call in child.calls:
        call.child = None
    child.calls.clear()


# In a forked process


def _serve(parent: int, function: Callable[[Any], Any], pipe: Connection, inherited: Sequence[Connection]) -> None:
    """Answer each argument that comes with the result of its call, until no more come."""
    end_with_parent(parent)
    for other in inherited:
        other.close()  # else the end of the process that it belongs to wouldn't be seen
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # Its threads aren't in this process, and the others use the processors.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what the parent made isn't written to by collections, so it stays shared
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, messages), daemon=True).start()
    while (message := messages.get()) is not None:
        try:
            answer = ForkingPickler.dumps((True, function(pickle.loads(message))))
        except Exception as error:
            answer = ForkingPickler.dumps((False, repr(error)))
        pipe.send_bytes(answer)


def _receive(pipe: Connection, messages: queue.SimpleQueue[bytes | None]) -> None:
    """Take arguments as they come: who hands one out doesn't wait until the one before is done. None stands at their end."""
    try:
        while True:
            messages.put(pipe.recv_bytes())
    except (EOFError, OSError):
        messages.put(None)
