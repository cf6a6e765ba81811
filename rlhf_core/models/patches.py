"""Where a patch of a model's layers holds: in the thread that made it, and in threads that continue that thread's context.

A patched `forward` is an attribute of a layer, and so every thread's. One that didn't make it runs the layer as it always does.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar

from torch import nn

_held: ContextVar[tuple[object, ...]] = ContextVar("patches", default=())
_turns: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


@contextlib.contextmanager
def holding(patch: object) -> Iterator[None]:
    """Let a patch hold inside the context."""
    before = _held.get()
    _held.set((*before, patch))
    try:
        yield
    finally:
        _held.set(before)


def holds(patch: object) -> bool:
    """Tell whether a patch holds here."""
    return any(each is patch for each in _held.get())


def turn_of(network: nn.Module) -> threading.RLock:
    """Return the lock that a thread has while a network's layers are patched for it."""
    with _making:
        return _turns.setdefault(network, threading.RLock())
