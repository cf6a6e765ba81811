"""Call a function with many arguments in forked processes, and take the results in the order of the arguments.

Forked processes begin with all that is open and imported here, so nothing is loaded again, and share its memory until they write
to it. What a call changes in Python's objects stays in its process: the function returns what is needed.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
    waiting: deque[tuple[Argument, Future[Result] | None]] = deque()
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(os.getpid(), function),
    )
    error: BaseException | None = None
    try:
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
                    waiting.append((argument, _submitted(pool, argument)))
                continue
            argument, future = waiting.popleft()
            yield argument, _result_of(future)
    except BaseException:
        # Calls that are handed out would be waited for: whoever stops a run may not wait as long.
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if not isinstance(error, StopIteration):
        raise error


def _submitted(pool: ProcessPoolExecutor, argument: Any) -> Future[Any] | None:
    """Hand a call out; None where the processes have ended or can't be started."""
    # The first call starts the processes: a signal that reached them before `_begin` would be answered as by this process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return pool.submit(_call, argument)
    except (BrokenProcessPool, OSError) as error:
        log.debug("a call isn't handed out: %s", error)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result_of(future: Future[Any] | None) -> Any | None:
    if future is None:
        return None
    try:
        return future.result()
    except Exception as error:  # The call's, or that of a process which ended.
        log.debug("a call failed in its process: %s", error)
        return None


_function: Callable[[Any], Any] | None = None
"""What this process calls, where it was forked for calls."""


def _begin(parent: int, function: Callable[[Any], Any]) -> None:
    """Prepare a forked process."""
    global _function
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # its threads aren't in this process, and the others use the processors
    )
    gc.freeze()  # what the parent made isn't written to by collections, so it stays shared
    _function = function


def _call(argument: Any) -> Any:
    assert _function is not None
    return _function(argument)
