"""Work at many items at once: in processes where this one may be forked, else in threads.

Operations on a chunk take microseconds, and threads wait for the interpreter's lock between them, a third of a merge's time on
two cores; processes don't. They are forked, so they begin with all that is open and imported here, and share its memory until
they write to it. What they change in Python's objects stays theirs: results go through files.

A library's pool can't replace this: `concurrent.futures` takes a killed process for a broken pool without saying which signal
ended it, `multiprocessing.Pool` waits for its work for ever, and neither ends work under way at once or passes progress on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import numpy
import torch

from rlhf_core.infra.child_process import end_with_parent
from rlhf_core.infra.errors import StorageError, error_report, reported_error

T = TypeVar("T")

Advance = Callable[[int], None]
"""Called at work with the bytes that were done since it was called last."""
Work = Callable[[T, Advance], None]

_KEPT = 16 << 20
"""Bytes up to which freed memory is kept: many chunks, below the 32 MiB above which glibc always maps."""
_EVERY = 0.05
"""Seconds between two messages of a worker about how far it is."""


def spread(
    items: Sequence[T], work: Work[T], count: int, *, forked: bool, enter: Callable[[], None] | None = None
) -> Generator[tuple[T, int | None]]:
    """Work at items in their order, `count` at once; yield (item, bytes) as they are done and (item, None) after an item's end.

    Close the generator where it isn't iterated to its end: work under way is then given up.

    Args:
        items: what to work at.
        work: called with an item and `Advance`, in a thread or a process of one torch thread, without gradients.
        count: items at once.
        forked: in processes; in threads where not even one can be started, and in this thread where not even a thread can.
        enter: called once in each process, to release what only its parent may hold.

    Raises:
        Exception: what `work` raised first; the others' work is given up. From a process, known errors and errors of the system
            come as they are, all else as RemoteError.
        StorageError: a process ended before its work did.
    """
    workers: dict[Connection, _Worker] = {}
    todo = iter(range(len(items)))
    try:
        for _ in range(min(count, len(items))):
            try:
                worker = _Worker((items, work, enter if forked else None), list(workers), forked=forked)
            except OSError:  # no more processes or memory: fewer will do
                break
            workers[worker.connection] = worker
        if not workers:
            yield from spread(items, work, count, forked=False) if forked else _in_this_thread(items, work)
            return
        for worker in workers.values():
            worker.begin(next(todo, None))
        while busy := [connection for connection, worker in workers.items() if worker.index is not None]:
            for ready in wait(busy):
                worker = workers[cast(Connection, ready)]
                item, event = items[cast(int, worker.index)], worker.receive()
                if event is None:
                    worker.begin(next(todo, None))
                yield item, event
        for worker in workers.values():
            worker.end()
    except BaseException:
        for worker in workers.values():
            worker.end(give_up=True)
        raise
    finally:
        for worker in workers.values():
            worker.runner.join()


def _in_this_thread(items: Sequence[T], work: Work[T]) -> Generator[tuple[T, int | None]]:
    """Work at the items one after the other, where no pipe is to be had, for all of the process's descriptors are in use."""
    for item in items:
        done: list[int] = []
        with torch.inference_mode():
            work(item, done.append)
        yield item, sum(done)
        yield item, None


class _Worker:
    """A process or thread that works at one item at a time, as the parent sees it.

    Args:
        service: what it works at, the work, and what it calls first.
        others: the workers before it; `forked` ones inherit their connections.
        forked: whether it is a process.

    Raises:
        OSError: no process can be started.
    """

    index: int | None = None
    """Number of the item that it works at."""

    def __init__(self, service: tuple[Any, ...], others: Sequence[Connection], *, forked: bool) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self._errors: list[BaseException] = []
        """What was raised, where the worker shares this process's memory."""
        service = (theirs, *service, self._errors)
        self.runner: BaseProcess | threading.Thread
        if not forked:
            self.runner = threading.Thread(target=_serve, args=service)
            self.runner.start()
            return
        arguments = (os.getpid(), [*others, self.connection], *service)
        self.runner = multiprocessing.get_context("fork").Process(target=_serve_in_process, args=arguments, daemon=True)
        # Ctrl-C goes to all of a terminal's processes. The parent answers it, and a child never sees it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.runner.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def begin(self, index: int | None) -> None:
        """Hand it the next item; None leaves it idle."""
        self.index = index
        if index is not None:
            try:
                self.connection.send(index)
            except ConnectionError:
                raise self._ended() from None

    def receive(self) -> int | None:
        """Return the bytes that it reports, or None for the end of its item; raise the error that it reports, or its end."""
        try:
            event = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None
        if isinstance(event, dict):
            raise self._errors[0] if self._errors else reported_error(event)
        return cast("int | None", event)

    def end(self, *, give_up: bool = False) -> None:
        """Let it end once its item is done; `give_up` kills a process at once, and ends a thread when it next reports."""
        if give_up and isinstance(self.runner, BaseProcess):
            self.runner.kill()
        with suppress(OSError):
            self.connection.send(None)  # not the closing alone: a process that someone forked may hold our end, too
        self.connection.close()

    def _ended(self) -> BaseException:
        """Return why a process hung up: the error that it still reported, else how it ended."""
        with suppress(EOFError, ConnectionError):
            while self.connection.poll():
                if isinstance(event := self.connection.recv(), dict):
                    return reported_error(event)
        self.runner.join()
        process = cast(BaseProcess, self.runner)
        code = process.exitcode or 0
        fix = (
            "where memory was short, set fewer `threads`"
            if code == -signal.SIGKILL
            else "set `threads: 1` to see where"
        )
        return StorageError(
            "one of the merge's processes ended before its work did",
            place=f"process {process.pid}",
            got=signal.Signals(-code).name if code < 0 else f"exit code {code}",
            fix=f"{fix}; --resume continues the merge",
        )


def _serve(
    connection: Connection,
    items: Sequence[Any],
    work: Work[Any],
    enter: Callable[[], None] | None,
    errors: list[BaseException],
) -> None:
    """Work at the items whose numbers are received, until None is or the parent is gone; put what is raised into `errors`."""
    torch.set_num_threads(1)
    _keep_freed_memory()
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
        errors.append(error)
        with suppress(OSError):  # the parent hung up
            connection.send(error_report(error))


def _keep_freed_memory() -> None:
    """Have the C library keep freed memory of a chunk's size for the next chunk instead of returning it to the system.

    glibc maps blocks of 128 KiB and more, and unmaps them when they are freed, until it has seen larger ones freed; without this
    each temporary tensor is mapped and its pages are zeroed again, up to a fifth of a merge's time.
    """
    numpy.empty(_KEPT, dtype=numpy.uint8)  # freed at once


def _serve_in_process(parent: int, inherited: Sequence[Connection], *service: Any) -> None:
    """Serve as a forked process, which ends with its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)
    for connection in inherited:
        connection.close()  # else it would never be noticed that the parent is gone
    _serve(*service)
