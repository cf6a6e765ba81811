"""Work at many things side by side: in processes where this one may be forked, else in threads.

Operations on a chunk take microseconds, and threads wait for the interpreter's lock between them, a third of a merge's time on
two cores; processes don't. They are forked, so they begin with all that is open and imported here, and share its memory until
they write to it. What they change in Python's objects stays theirs: results go through files.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch

from rlhf_core.errors import RLHFError, StorageError

T = TypeVar("T")

Told = Callable[[int], None]
"""Called at work with the bytes that were done since it was called last."""
Work = Callable[[T, Told], None]

_EVERY = 0.05
"""Seconds between two messages of a process about how far it is."""


def may_fork() -> bool:
    """Tell whether this process may be forked: with other threads, a lock that one of them holds would stay held for ever."""
    return sys.platform == "linux" and threading.active_count() == 1 and not multiprocessing.current_process().daemon


def spread(
    items: Sequence[T], work: Work[T], count: int, *, forked: bool, enter: Callable[[], None] | None = None
) -> Generator[tuple[T, int | None]]:
    """Work at items in their order, `count` at once; yield (item, bytes) as they are done and (item, None) after an item's end.

    Close the iterator where it isn't gone through to its end: what is under way is then given up.

    Args:
        items: what to work at.
        work: called with an item and `Told`, in a thread or a process of one torch thread, without gradients.
        count: items at once.
        forked: in processes.
        enter: called once in each process, to let go of what is its parent's alone.

    Raises:
        RLHFError: what `work` raised first; the others' work is given up.
        WorkerError: the same of another kind, in a process. In a thread it is raised as it is.
        StorageError: a process was killed.
    """
    count = max(1, min(count, len(items)))
    return _in_processes(items, work, count, enter) if forked else _in_threads(items, work, count)


class _GivenUp(BaseException):
    """Ends a thread's work that nobody waits for."""


def _in_threads(items: Sequence[T], work: Work[T], count: int) -> Generator[tuple[T, int | None]]:
    events: queue.SimpleQueue[tuple[T, int | BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def run(item: T) -> None:
        def told(nbytes: int) -> None:
            if stop.is_set():
                raise _GivenUp
            events.put((item, nbytes))

        if stop.is_set():
            return
        try:
            with torch.inference_mode():
                work(item, told)
            events.put((item, None))
        except BaseException as error:
            events.put((item, error))

    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                pool.submit(run, item)
            left = len(items)
            while left:
                item, event = events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= event is None
                yield item, event
        finally:
            stop.set()


def _in_processes(
    items: Sequence[T], work: Work[T], count: int, enter: Callable[[], None] | None
) -> Generator[tuple[T, int | None]]:
    context = multiprocessing.get_context("fork")
    workers: dict[Connection, Any] = {}
    busy: dict[Connection, int] = {}
    todo = iter(range(len(items)))

    def hand_out(connection: Connection) -> None:
        index = next(todo, None)
        if index is not None:
            busy[connection] = index
            connection.send(index)

    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, [*workers, ours], items, work, enter, os.getpid())
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        for connection in workers:
            hand_out(connection)
        while busy:
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                item = items[busy[connection]]
                try:
                    event = connection.recv()
                except (EOFError, ConnectionError):
                    raise _ended(workers[connection]) from None
                if isinstance(event, dict):
                    raise _rebuilt(event)
                if event is None:
                    del busy[connection]
                    hand_out(connection)
                yield item, event
    except BaseException:
        for process in workers.values():
            process.kill()
        raise
    finally:
        for connection, process in workers.items():
            connection.close()  # a process that waits for more ends
            process.join()


def _serve(
    connection: Connection,
    parents: Sequence[Connection],
    items: Sequence[T],
    work: Work[T],
    enter: Callable[[], None] | None,
    parent: int,
) -> None:
    """Work at the items whose numbers come, in a process of its own, until the parent wants no more or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal's processes; the parent answers it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in parents:
        other.close()  # else it would never be seen that the parent is gone
    if enter is not None:
        enter()
    torch.set_num_threads(1)
    pending, sent = 0, time.monotonic()

    def told(nbytes: int) -> None:
        nonlocal pending, sent
        if os.getppid() != parent:
            os._exit(1)
        pending += nbytes
        if (now := time.monotonic()) - sent > _EVERY:
            connection.send(pending)
            pending, sent = 0, now

    try:
        while True:
            item = items[connection.recv()]
            try:
                with torch.inference_mode():
                    work(item, told)
            except BaseException as error:
                connection.send(_report(error))
                return
            connection.send(pending)
            connection.send(None)
            pending = 0
    except (EOFError, ConnectionError):
        return


class WorkerError(Exception):
    """What isn't a user's fault and was raised in a process of its own; its note has the lines where."""


def _report(error: BaseException) -> dict[str, Any]:
    """Return what another process needs to know of an error."""
    if isinstance(error, RLHFError):
        return {"fault": error.to_json()}
    return {"text": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def _rebuilt(report: dict[str, Any]) -> Exception:
    if "fault" in report:
        return RLHFError.from_json(report["fault"])
    error = WorkerError(report["text"])
    error.add_note(report["trace"])
    return error


def _ended(process: Any) -> StorageError:
    process.join()
    code = process.exitcode
    return StorageError(
        "one of the merge's processes was ended from outside",
        place=f"process {process.pid}",
        got=signal.Signals(-code).name if code and code < 0 else f"exit code {code}",
        fix="where memory was short, set fewer `threads`; --resume goes on",
    )
