"""Logs on stderr: in colour on a terminal, else as plain lines."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from rlhf_core.infra.errors import printable
from rlhf_core.infra.library_logs import log_libraries_at_debug

if TYPE_CHECKING:
    from rich.console import Console

LOGGER = "rlhf_core"
SHIPPED = "rlhf_plugins"
"""The package of the methods that ship with the core."""


@cache
def console() -> Console:
    """Return the console on stderr that log lines and progress bars share, so that they don't overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


WIDTH = 80
"""Columns of a line of the log where there is no terminal."""
_TIME = "%H:%M:%S"
_BEFORE = len("23:59:59 ")
"""Columns that the time takes before each line."""


def message_width() -> int:
    """Return how many columns a message has that is to fit one line: the terminal's, or 80, less the time before it."""
    return (console().width if sys.stderr.isatty() else WIDTH) - _BEFORE


class PrintableFormatter(logging.Formatter):
    """Escapes control characters in log lines, which repeat names and texts of plugins, files and models."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)

    def formatMessage(self, record: logging.LogRecord) -> str:
        # What is usual needs no name: the line is for people, and has 80 columns.
        record.shown_level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return super().formatMessage(record)


def log_to_stderr(packages: Sequence[str], level: int | str = logging.INFO, *, rank: int = 0) -> logging.Logger:
    """Send the logs of the core and of other top-level packages to stderr; return the core's logger.

    What the libraries underneath log and warn of is shown at the level DEBUG only.

    Calling it again replaces the handlers that it added before; all other loggers stay as they are.

    Args:
        packages: top-level packages whose logs are shown, beside the core's.
        level: the lowest level that is shown.
        rank: this process's number in a distributed run; all but rank 0 show warnings and errors only.
    """
    handler = stderr_handler(rank=rank)
    log_libraries_at_debug()
    for name in (LOGGER, *packages):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            # A plugin's own handler, say to a file, stays.
            if name == LOGGER or old.name == LOGGER:
                logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    return logging.getLogger(LOGGER)


def stderr_handler(*, rank: int = 0) -> logging.Handler:
    """Return a handler that shows records on stderr: of all processes but the first, warnings and errors only.

    A record with the attribute `same_everywhere` is one that every process logs; the first process alone shows it.
    """
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(
            console=console(),
            show_path=False,
            show_level=False,
            log_time_format=_TIME,
            keywords=["DEBUG", "WARNING", "ERROR", "CRITICAL"],  # the words that are shown in colour
        )
        handler.setFormatter(PrintableFormatter("%(shown_level)s%(message)s"))
    else:
        hide_library_bars()
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PrintableFormatter("%(asctime)s %(shown_level)s%(message)s", _TIME))
    if rank:
        handler.addFilter(_is_of_this_process)
    handler.set_name(LOGGER)
    return handler


def _is_of_this_process(record: logging.LogRecord) -> bool:
    """Return whether a process that isn't the first shows a record: a warning of something that the others don't log, too."""
    return record.levelno >= logging.WARNING and not getattr(record, "same_everywhere", False)


class ShownOnce(logging.Handler):
    """Shows records on stderr, but for those that the root logger's handlers would get: these go there alone.

    Args:
        shown: the handler for stderr.
        level: the level that held for the loggers of the core and plugins before.
    """

    def __init__(self, shown: logging.Handler, level: int) -> None:
        super().__init__()
        self._shown, self._level = shown, level

    def emit(self, record: logging.LogRecord) -> None:
        root, logger = logging.getLogger(), logging.getLogger(record.name)
        # A module's logger with a level of its own has let the record pass, whatever the level above.
        own = logger.level and logger.parent is not root
        if root.handlers and (own or record.levelno >= self._level):
            root.callHandlers(record)
        else:
            self._shown.handle(record)


def hide_library_bars() -> None:
    """Switch off the progress bars of transformers, datasets and huggingface_hub, whether imported yet or not."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name, disable in (
        ("transformers.utils.logging", "disable_progress_bar"),
        ("datasets", "disable_progress_bars"),
    ):
        if name in sys.modules:
            getattr(sys.modules[name], disable)()
