"""Warn of a reward that leaves threads or open files behind with every call, which ends a long run hours later."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from rlhf_core.contracts.reward import RewardFn

log = logging.getLogger(__name__)

CALLS = 8
"""Calls in a row that must each leave something before the user is warned: a client or a pool that is kept grows less often."""


class _Left:
    """What a reward's calls have left since the last call that left nothing."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(("threads", "open files"), 0)
        self.count = dict.fromkeys(self.calls, 0)
        self.warned = False


_left: weakref.WeakKeyDictionary[RewardFn, _Left] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def watch_leaks(reward: RewardFn, name: str) -> Iterator[None]:
    """Count threads and open files before and after a call, and warn once where `CALLS` calls in a row each left some.

    Memory isn't counted: a process's memory also grows by what its allocator keeps, and by other parts of the run. A reward in a
    process of its own has that process replaced when its memory grows (`reward_process`).
    """
    before = _counts()
    yield
    left = _left.setdefault(reward, _Left())
    if left.warned:
        return
    for what, now in _counts().items():
        grown = now - before[what]
        left.calls[what] = left.calls[what] + 1 if grown > 0 else 0
        left.count[what] = left.count[what] + grown if grown > 0 else 0
        if left.calls[what] >= CALLS:
            left.warned = True
            log.warning(
                "reward `%s` left %d more %s in %d calls: it leaks them, which will end a long run; close what it opens,"
                " or run it in a process (`runs_in`)",
                name, left.count[what], what, CALLS,
            )  # fmt: skip


def _counts() -> dict[str, int]:
    """Return how many threads this process has, and how many open files where the system shows it."""
    files = 0
    with contextlib.suppress(OSError):
        files = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return {"threads": threading.active_count(), "open files": files}
