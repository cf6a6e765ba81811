"""How many tokens are drawn, and how many are forwarded, reported to whoever watches."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_watchers: contextvars.ContextVar[tuple[Callable[[int], None], ...]] = contextvars.ContextVar("watchers", default=())
_Counter = tuple[Callable[[int], None], object | None]
_counters: contextvars.ContextVar[tuple[_Counter, ...]] = contextvars.ContextVar("counters", default=())


@contextlib.contextmanager
def watching(callback: Callable[[int], None]) -> Iterator[None]:
    """Have a function called, inside the context, with the number of new tokens after each decoding step of any engine."""
    before = _watchers.get()
    token = _watchers.set((*before, callback))
    try:
        yield
    finally:
        _watchers.reset(token)


@contextlib.contextmanager
def counting_forwarded(callback: Callable[[int], None], *, of: object | None = None) -> Iterator[None]:
    """Have a function called, inside the context, with the number of tokens of each forward pass of any engine.

    Args:
        of: the network whose passes count; None counts those of all.
    """
    before = _counters.get()
    token = _counters.set((*before, (callback, of)))
    try:
        yield
    finally:
        _counters.reset(token)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Report nothing of what is forwarded inside the context, such as a measurement."""
    token = _counters.set(())
    try:
        yield
    finally:
        _counters.reset(token)


def report_forwarded(count: int, network: object) -> None:
    """Tell whoever counts that a network was run on so many tokens."""
    for callback, of in _counters.get():
        if of is None or of is network:
            callback(count)


def report_tokens(count: int) -> None:
    """Tell whoever watches that so many tokens were drawn."""
    for callback in _watchers.get():
        callback(count)
