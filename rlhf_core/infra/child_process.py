"""Child processes: one that reads and writes lines of JSON, and one that ends when its parent does, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any, BinaryIO

_PR_SET_PDEATHSIG = 1
"""A constant of Linux's prctl.h."""

_LAST_OUTPUT = 1.0
"""Seconds to wait for the last output of a dead child, whose pipe a process that it started may hold open."""


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process at once when its parent ends; on other systems do nothing.

    For Linux the parent is the thread that started this process: one that a short-lived thread starts is killed when the thread
    ends.

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


class ChildProcess:
    """A Python process that is sent lines of JSON on its stdin and writes lines on its stdout.

    Args:
        code: what the child runs.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, code: str, *, quiet: bool = False) -> None:
        # In a new session: Ctrl-C on the terminal doesn't reach the child, and one signal ends it with all that it started.
        self.process = subprocess.Popen(
            [sys.executable or "python", "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        assert self.process.stdout is not None
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, stream: BinaryIO) -> None:
        with stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def send(self, value: Any, *, last: bool = False) -> None:
        """Write a value to the child as a line of JSON; after the `last` its stdin is closed. A dead child is no error."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()
            if last:
                self.process.stdin.close()

    def next_line(self, seconds: float) -> bytes | None:
        """Return the next line, or None where none comes within `seconds` or the process has ended."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=min(left, 0.2))
            if self.process.poll() is not None:
                with contextlib.suppress(queue.Empty):
                    return self._lines.get(timeout=_LAST_OUTPUT)
                return None
        return None

    def how_it_ended(self) -> str:
        """Return how the process ended, in words: `exit code 3`, `SIGSEGV`."""
        try:
            code = self.process.wait(timeout=_LAST_OUTPUT)
        except subprocess.TimeoutExpired:
            return "it doesn't answer any more"
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"

    def kill(self) -> None:
        """End the child and all that it started."""
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]


def take_stdio() -> tuple[IO[str], IO[str]]:
    """Return this child's stdin and stdout for its messages alone: other output goes to stderr, and other reads find nothing."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return requests, answers
