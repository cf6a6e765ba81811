"""Run code that others wrote, such as a plugin's import, so that it can't take the program with it.

What it prints goes to stderr, for stdout is for results; whatever it raises, `SystemExit` and `KeyboardInterrupt` too, is one
fault with a reason; the working directory, `sys.argv` and what is logged are afterwards as they were. The user's own Ctrl-C still
interrupts. What ends the process at once (`os._exit`, a crash in C code) can
only be outlived by another process: see `rlhf_core.registry.trial_import`.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO, TypeVar

from rlhf_core.infra.errors import describe_error

T = TypeVar("T")


class GuardedError(Exception):
    """Foreign code raised; the text says what, in one line, and the cause is the exception itself."""


def run_guarded(action: Callable[[], T]) -> T:
    """Call `action` and return its value, with stdout turned to stderr meanwhile.

    Raises:
        GuardedError: it raised anything at all.
        KeyboardInterrupt: the user pressed Ctrl-C meanwhile (or what the program's own handler raises then), even where the
            foreign code swallowed it.
    """
    watch, surroundings = _InterruptWatch(), _Surroundings()
    try:
        with _Diversion():
            value = action()
    except BaseException as error:
        if watch.raised is None:
            raise GuardedError(describe_error(error)) from error
    finally:
        watch.stop()
        surroundings.restore()
    if watch.raised is not None:
        raise watch.raised
    return value


class _InterruptWatch:
    """Notes what a real SIGINT raises, which tells it from a `KeyboardInterrupt` that foreign code makes up."""

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            self._before(number, frame)
        except BaseException as error:
            self.raised = error
            raise

    def stop(self) -> None:
        # A handler that the foreign code set stays: a library may need its own.
        if self._before is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._before)


class _Surroundings:
    """What the program's own paths and log lines depend on."""

    def __init__(self) -> None:
        self._directory = _directory()
        self._arguments, self._words = sys.argv, list(sys.argv)
        self._unlogged = _manager().disable if "logging" in sys.modules else 0

    def restore(self) -> None:
        if self._directory and _directory() != self._directory:
            with contextlib.suppress(OSError):
                os.chdir(self._directory)
        sys.argv, sys.argv[:] = self._arguments, self._words
        if "logging" in sys.modules:
            _manager().disable = self._unlogged


def _directory() -> str:
    with contextlib.suppress(OSError):  # it may be gone
        return os.getcwd()  # noqa: PTH109
    return ""


def _manager() -> Any:
    import logging

    return logging.root.manager


class _Diversion:
    """Turns stdout to stderr, for Python and for whatever writes to the file descriptor (C code, child processes).

    Several may be entered at once, by nested loads and by threads: the first turns it, the last turns it back. No lock is held
    between, so that an import that waits for another thread's import can't lock up here.
    """

    _lock = threading.Lock()
    _depth = 0
    _streams: tuple[TextIO, TextIO]
    _stdout: int | None = None

    def __enter__(self) -> None:
        kind = _Diversion
        with kind._lock:
            kind._depth += 1
            if kind._depth == 1:
                kind._streams = (sys.stdout, sys.stderr)
                _flush(sys.stdout)
                kind._stdout = None
                with contextlib.suppress(OSError):  # a program may have closed either
                    kind._stdout = os.dup(1)
                    os.dup2(2, 1)
                sys.stdout = _StandIn()

    def __exit__(self, *_: object) -> None:
        kind = _Diversion
        with kind._lock:
            kind._depth -= 1
            if kind._depth == 0:
                _flush(sys.stdout)
                if kind._stdout is not None:
                    with contextlib.suppress(OSError):
                        os.dup2(kind._stdout, 1)
                        os.close(kind._stdout)
                sys.stdout, sys.stderr = kind._streams


def turn_stdout() -> None:
    """Turn stdout to stderr for the rest of the process."""
    _Diversion().__enter__()


def _flush(stream: TextIO | None) -> None:
    """Flush a stream of Python's and C's own buffers, which else reach the descriptor once it is turned."""
    with contextlib.suppress(Exception):
        if stream is not None:
            stream.flush()
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).fflush(None)


class _StandIn(io.TextIOBase):
    """Stands for `sys.stdout` and writes to stderr. Modules that close, detach, wrap or reconfigure it harm neither."""

    encoding = "utf-8"
    errors = "replace"
    name = "<stdout>"

    def write(self, text: str) -> int:
        if sys.stderr is not None:
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def fileno(self) -> int:
        return 1

    def reconfigure(self, **_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def detach(self) -> Any:
        return self.buffer

    @property
    def buffer(self) -> Any:
        return _StandInBytes()


class _StandInBytes(io.BufferedIOBase):
    def write(self, data: Any) -> int:
        if sys.stderr is not None:
            sys.stderr.write(bytes(data).decode("utf-8", "replace"))
        return len(data)

    def writable(self) -> bool:
        return True
