"""Call code of other packages, such as a plugin's import, so that whatever it raises or changes can't stop the program.

What it prints goes to stderr, for stdout is for results. Whatever it raises, `SystemExit` and `KeyboardInterrupt` included,
becomes one `GuardedError` with a reason. The working directory, `sys.argv` and the logging threshold are restored afterwards.
The user's own Ctrl-C still interrupts. Only another process survives code that ends its process at once (`os._exit`, a crash in
C code): see `rlhf_core.registry.trial_import`.
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
    """The guarded code raised: the text describes the exception in one line, `__cause__` is the exception itself."""


def run_guarded(action: Callable[[], T]) -> T:
    """Call `action` and return its value; stdout goes to stderr meanwhile.

    Raises:
        GuardedError: `action` raised anything at all.
        KeyboardInterrupt: the user pressed Ctrl-C meanwhile, even where `action` caught that. Where the program has its own
            handler of SIGINT, what that handler raised is raised instead.
    """
    watch, state = _InterruptWatch(), _ProcessState()
    try:
        with _StdoutToStderr():
            value = action()
    except BaseException as error:
        if watch.raised is None:
            raise GuardedError(describe_error(error)) from error
    finally:
        watch.stop()
        state.restore()
    if watch.raised is not None:
        raise watch.raised
    return value


class _InterruptWatch:
    """Keep what the handler of a real SIGINT raised, to tell it from a `KeyboardInterrupt` that the guarded code raised."""

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
        # A handler that the guarded code set stays: a library may need its own.
        if self._before is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._before)


class _ProcessState:
    """The working directory, `sys.argv` and the logging threshold, to be restored."""

    def __init__(self) -> None:
        self._directory = _directory()
        self._arguments, self._words = sys.argv, list(sys.argv)
        self._unlogged = _manager().disable if "logging" in sys.modules else 0

    def restore(self) -> None:
        """Set what the guarded code changed back to what it was."""
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


class _StdoutToStderr:
    """Redirects stdout to stderr, for Python and for whatever writes to file descriptor 1 (C code, child processes).

    It may be entered several times, by nested loads and by threads: the first redirects, the last restores. No lock is held in
    between, so that an import that waits for another thread's import can't deadlock here.
    """

    _lock = threading.Lock()
    _depth = 0
    _streams: tuple[TextIO, TextIO]
    _stdout: int | None = None

    def __enter__(self) -> None:
        shared = _StdoutToStderr
        with shared._lock:
            shared._depth += 1
            if shared._depth == 1:
                shared._streams = (sys.stdout, sys.stderr)
                _flush(sys.stdout)
                shared._stdout = None
                with contextlib.suppress(OSError):  # a program may have closed either
                    shared._stdout = os.dup(1)
                    os.dup2(2, 1)
                sys.stdout = _RedirectedStdout()

    def __exit__(self, *_: object) -> None:
        shared = _StdoutToStderr
        with shared._lock:
            shared._depth -= 1
            if shared._depth == 0:
                _flush(sys.stdout)
                if shared._stdout is not None:
                    with contextlib.suppress(OSError):
                        os.dup2(shared._stdout, 1)
                        os.close(shared._stdout)
                sys.stdout, sys.stderr = shared._streams


def redirect_stdout_for_good() -> None:
    """Redirect stdout to stderr for the rest of the process."""
    _StdoutToStderr().__enter__()


def _flush(stream: TextIO | None) -> None:
    """Flush Python's buffer of a stream and C's buffers, whose contents would else go where the descriptor points next."""
    with contextlib.suppress(Exception):
        if stream is not None:
            stream.flush()
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).fflush(None)


class _RedirectedStdout(io.TextIOBase):
    """A `sys.stdout` that writes to stderr; closing, detaching, wrapping or reconfiguring it changes neither stream."""

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
        return _RedirectedBytes()


class _RedirectedBytes(io.BufferedIOBase):
    def write(self, data: Any) -> int:
        if sys.stderr is not None:
            sys.stderr.write(bytes(data).decode("utf-8", "replace"))
        return len(data)

    def writable(self) -> bool:
        return True
