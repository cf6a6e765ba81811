"""Ctrl-C and SIGTERM in a chat: they end the drawing of an answer, and never what prints or saves it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM."""


class ChatStops:
    """Within this context Ctrl-C raises `KeyboardInterrupt` and SIGTERM `Terminated`, but not in the midst of keeping an answer.

    While a message is answered they are raised where a token is drawn, and wait elsewhere: neither a stop nor a second one, of
    impatience, loses what was written. Where SIGINT is ignored, as in a background job, it stays ignored.

    Args:
        terminal: whether somebody types; a Ctrl-C that came when the answer was whole is then forgotten, for at the prompt it
            would leave the chat.
    """

    def __init__(self, *, terminal: bool) -> None:
        self.terminal = terminal
        self._answering = self._drawing = False
        self._waiting: int | None = None
        """The signal that waits."""

    def __enter__(self) -> ChatStops:
        taken = [signal.SIGTERM, *([] if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else [signal.SIGINT])]
        self._before = {number: signal.signal(number, self._handle) for number in taken}
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Hold signals back, but for where `drawing` lets them through; one that still waits at the end is raised then."""
        self._answering, self._waiting = True, None
        try:
            yield
        finally:
            self._answering = False
        if self._waiting is not None and not (self.terminal and self._waiting == signal.SIGINT):
            raise _error(self._waiting)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Raise a signal that waits, or that comes."""
        self._drawing = True
        try:
            if self._waiting is not None:
                raise self._taken()
            yield
        finally:
            self._drawing = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._waiting != signal.SIGTERM:
            self._waiting = number
        if self._drawing or not self._answering:
            raise self._taken()

    def _taken(self) -> KeyboardInterrupt:
        """Return the error of the signal that waits, which waits no longer."""
        number, self._waiting = self._waiting, None
        return _error(number)


def _error(number: int | None) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
