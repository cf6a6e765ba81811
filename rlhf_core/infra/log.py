"""Logs for people: on stderr, in colour where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LOGGER = "rlhf_core"


@cache
def console() -> Console:
    """Return the console on stderr that log lines and progress bars share, so that they don't overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


def setup_logging(level: int | str = logging.INFO, *, rank: int = 0) -> logging.Logger:
    """Send the core's log to stderr and return its logger. Processes but the first show warnings only.

    Calling it again replaces what it set up before; other loggers are left alone.
    """
    logger = logging.getLogger(LOGGER)
    if not sys.stderr.isatty():
        hide_library_bars()
    for old in list(logger.handlers):
        logger.removeHandler(old)
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(console=console(), show_path=False, log_time_format="%H:%M:%S", markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    if rank:
        handler.addFilter(lambda record: record.levelno >= logging.WARNING)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return logger


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
