"""Logs on stderr: in colour on a terminal, else as plain lines."""

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
    """Escapes control characters in log lines, which repeat names and texts of plugins, files and models."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def log_to_stderr(packages: Sequence[str], level: int | str = logging.INFO, *, rank: int = 0) -> logging.Logger:
    """Send the logs of the core and of other top-level packages to stderr; return the core's logger.

    Calling it again replaces the handlers that it added before; all other loggers stay as they are.

    Args:
        packages: top-level packages whose logs are shown, beside the core's.
        level: the lowest level that is shown.
        rank: this process's number in a distributed run; all but rank 0 show warnings and errors only.
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
            # A plugin's own handler, say to a file, stays.
            if name == LOGGER or old.name == LOGGER:
                logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    return logging.getLogger(LOGGER)


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
