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
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import torch

from rlhf_core.infra.child_process import end_with_parent
from rlhf_core.infra.errors import RLHFError, StorageError

T = TypeVar("T")

Advance = Callable[[int], None]
"""Called at work with the bytes that were done since it was called last."""
Work = Callable[[T, Advance], None]

_EVERY = 0.05
"""Seconds between two messages of a process about how far it is."""


def may_fork() -> bool:
    """Tell whether this process may be forked: a lock that another thread held would stay held for ever.

    Python's threads are counted. Those of BLAS and OpenMP, which wait for work, are not: the libraries see to them at a fork.
    """
    return sys.platform == "linux" and threading.active_count() == 1 and not multiprocessing.current_process().daemon


def spread(
    items: Sequence[T], work: Work[T], count: int, *, forked: bool, enter: Callable[[], None] | None = None
) -> Generator[tuple[T, int | None]]:
    """Work at items in their order, `count` at once; yield (item, bytes) as they are done and (item, None) after an item's end.

    Close the iterator where it isn't gone through to its end: what is under way is then given up.

    Args:
        items: what to work at.
        work: called with an item and `Advance`, in a thread or a process of one torch thread, without gradients.
        count: items at once.
        forked: in processes.
        enter: called once in each process, to let go of what is its parent's alone.

    Raises:
        Exception: what `work` raised first; the others' work is given up. From a process, faults and errors of the system come as
            they are, all else as WorkerError.
        StorageError: a process ended before its work did.
    """
    if items:
        count = min(count, len(items))
        yield from _in_processes(items, work, count, enter) if forked else _in_threads(items, work, count)


class _GivenUp(BaseException):
    """Ends a thread's work that nobody waits for."""


def _in_threads(items: Sequence[T], work: Work[T], count: int) -> Generator[tuple[T, int | None]]:
    events: queue.SimpleQueue[tuple[T, int | BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def run(item: T) -> None:
        def advance(nbytes: int) -> None:
            if stop.is_set():
                raise _GivenUp
            events.put((item, nbytes))

        if stop.is_set():
            return
        try:
            with torch.inference_mode():
                work(item, advance)
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
    workers: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, int] = {}
    todo = iter(range(len(items)))

    def hand_out(connection: Connection) -> None:
        index = next(todo, None)
        if index is not None:
            busy[connection] = index
            try:
                connection.send(index)
            except ConnectionError:
                raise _ended(connection, workers[connection]) from None

    try:
        for _ in range(count):
            try:
                connection, process = _start(items, work, enter, list(workers))
            except OSError:  # no more processes or memory: fewer will do
                break
            workers[connection] = process
        if not workers:
            yield from _in_threads(items, work, count)
        for connection in workers:
            hand_out(connection)
        while busy:
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                item = items[busy[connection]]
                try:
                    event = connection.recv()
                except (EOFError, ConnectionError):
                    raise _ended(connection, workers[connection]) from None
                if isinstance(event, dict):
                    raise _rebuilt(event)
                if event is None:
                    del busy[connection]
                    hand_out(connection)
                yield item, event
        for connection in workers:
            with suppress(ConnectionError):
                connection.send(None)  # not the closing alone: a process that someone forked may hold our end, too
    except BaseException:
        for process in workers.values():
            process.kill()
        raise
    finally:
        for connection, process in workers.items():
            connection.close()
            process.join()


def _start(
    items: Sequence[T], work: Work[T], enter: Callable[[], None] | None, others: list[Connection]
) -> tuple[Connection, BaseProcess]:
    """Fork a process that serves."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    arguments = (theirs, [*others, ours], items, work, enter, os.getpid())
    process = context.Process(target=_serve, args=arguments, daemon=True)
    # Ctrl-C goes to all of a terminal's processes. The parent answers it, and a child never sees it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ours, process


def _serve(
    connection: Connection,
    parents: Sequence[Connection],
    items: Sequence[T],
    work: Work[T],
    enter: Callable[[], None] | None,
    parent: int,
) -> None:
    """Work at the items whose numbers come, in a process of its own, until the parent wants no more or is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)
    for other in parents:
        other.close()  # else it would never be seen that the parent is gone
    torch.set_num_threads(1)
    pending, sent = 0, time.monotonic()

    def advance(nbytes: int) -> None:
        nonlocal pending, sent
        pending += nbytes
        if (now := time.monotonic()) - sent > _EVERY:
            connection.send(pending)
            pending, sent = 0, now

    try:
        if enter is not None:
            enter()
        while (index := connection.recv()) is not None:
            with torch.inference_mode():
                work(items[index], advance)
            connection.send(pending)
            connection.send(None)
            pending = 0
    except BaseException as error:
        with suppress(ConnectionError):  # the parent hung up
            connection.send(_report(error))


class WorkerError(Exception):
    """What isn't a user's fault and was raised in a process of its own; its note has the lines where."""


def _report(error: BaseException) -> dict[str, Any]:
    """Return what another process needs to know of an error."""
    report: dict[str, Any] = {"text": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    if isinstance(error, RLHFError):
        report["fault"] = error.to_json()
    elif isinstance(error, OSError):
        report["system"] = (error.errno, error.strerror, error.filename)
    return report


def _rebuilt(report: dict[str, Any]) -> Exception:
    error: Exception = WorkerError(report["text"])
    if "fault" in report:
        with suppress(TypeError):  # a kind of its own making
            error = RLHFError.from_json(report["fault"])
    elif "system" in report:
        error = OSError(*report["system"])
    error.add_note(report["trace"])
    return error


def _ended(connection: Connection, process: BaseProcess) -> Exception:
    """Return why a process hung up: what it still said, else how it ended."""
    with suppress(EOFError, ConnectionError):
        while connection.poll():
            if isinstance(event := connection.recv(), dict):
                return _rebuilt(event)
    process.join()
    code = process.exitcode or 0
    short = code == -signal.SIGKILL
    return StorageError(
        "one of the merge's processes ended before its work did",
        place=f"process {process.pid}",
        got=signal.Signals(-code).name if code < 0 else f"exit code {code}",
        fix=("where memory was short, set fewer `threads`" if short else "set `threads: 1` to see where")
        + "; --resume goes on",
    )
