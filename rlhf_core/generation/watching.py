"""Progress of generation: how many tokens were drawn, told to whoever watches."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_watchers: contextvars.ContextVar[tuple[Callable[[int], None], ...]] = contextvars.ContextVar("watchers", default=())


@contextlib.contextmanager
def watching(callback: Callable[[int], None]) -> Iterator[None]:
    """Have a function called, inside the context, with the number of new tokens after each decoding step of any engine."""
    before = _watchers.get()
    token = _watchers.set((*before, callback))
    try:
        yield
    finally:
        _watchers.reset(token)


def report_tokens(count: int) -> None:
    """Tell whoever watches that so many tokens were drawn."""
    for callback in _watchers.get():
        callback(count)
