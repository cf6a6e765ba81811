"""Child processes that end when their parent does, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""A constant of Linux's prctl.h."""


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process at once when its parent ends; on other systems do nothing.

    Args:
        parent: the parent's process id, to notice that it ended before this call.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
