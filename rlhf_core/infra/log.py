"""Logs for people: on stderr, in colour where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from rlhf_core.infra.errors import printable

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


class PrintableFormatter(logging.Formatter):
    """Shows what a terminal would act upon: log lines repeat names and texts of plugins, files and models."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def log_to_stderr(packages: Sequence[str], level: int | str = logging.INFO, *, rank: int = 0) -> logging.Logger:
    """Send the log of the core and of other top-level packages to stderr; return the core's logger.

    Processes but the first show warnings only. Calling it again replaces what it set up before; other loggers are left alone.
    """
    if not sys.stderr.isatty():
        hide_library_bars()
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(console=console(), show_path=False, log_time_format="%H:%M:%S", markup=False)
        handler.setFormatter(PrintableFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    if rank:
        handler.addFilter(lambda record: record.levelno >= logging.WARNING)
    handler.set_name(LOGGER)
    for name in (LOGGER, *packages):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            # A plugin may have a handler of its own, say to a file.
            if name == LOGGER or old.name == LOGGER:
                logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    return logging.getLogger(LOGGER)


def hide_library_bars() -> None:
    """Keep the libraries' own progress bars out of a log file, whether they are imported yet or not."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name, disable in (
        ("transformers.utils.logging", "disable_progress_bar"),
        ("datasets", "disable_progress_bars"),
    ):
        if name in sys.modules:
            getattr(sys.modules[name], disable)()
