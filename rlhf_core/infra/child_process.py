"""Processes that end with the one that started them, however that one ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h."""


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process as soon as its parent is gone, in the middle of whatever it does; elsewhere do nothing."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
