"""A generator over what a function hands to a callback, for loops of others that can't be left and entered again.

The function runs in a thread of its own, which is suspended whenever the generator is: the two never run at the same time. What
belongs to a thread in torch (gradients, autocast, the present GPU) therefore stays the caller's own between two items.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class _Closed(BaseException):
    """Leaves the function, as its items are no longer wanted. No handler of errors catches it."""


class _End(NamedTuple):
    """The function has returned, or has raised an error."""

    error: BaseException | None


def handed_over(function: Callable[[Callable[[T], None]], None], device: torch.device) -> Generator[T]:
    """Yield what a function hands over, one item at a time; the function continues when the next one is asked for.

    It runs with the gradients, the autocast and the context variables that are in force where the first item is asked for.
    Closing the generator ends it at the item that it has handed over last, and waits until it has ended.

    Args:
        function: is called with the callback that takes its items. What it raises is raised here.
        device: that it computes on.
    """
    items: SimpleQueue[T | _End] = SimpleQueue()
    wanted: SimpleQueue[bool] = SimpleQueue()
    state = _thread_state(device)

    def hand_over(item: T) -> None:
        items.put(item)
        if not wanted.get():
            raise _Closed

    def run() -> None:
        try:
            with state:
                function(hand_over)
        except _Closed:
            pass
        except BaseException as error:
            items.put(_End(error))
        else:
            items.put(_End(None))

    context = contextvars.copy_context()
    # A daemon: a generator that nobody closes doesn't keep the process from ending.
    thread = threading.Thread(target=context.run, args=(run,), name="handed_over", daemon=True)
    thread.start()
    try:
        while not isinstance(item := items.get(), _End):
            yield item
            wanted.put(True)
        if item.error is not None:
            try:
                raise item.error
            finally:
                del item  # else this frame and the error, whose traceback holds tensors, would keep each other
    finally:
        wanted.put(False)
        thread.join()


def _thread_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context that gives another thread this thread's gradients, autocast and GPU."""
    kind, gradients = device.type, torch.is_grad_enabled()
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    gpu = torch.cuda.current_device() if kind == "cuda" else None

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if gpu is not None:
                stack.enter_context(torch.cuda.device(gpu))
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield

    return entered()
