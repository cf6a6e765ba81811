"""Send the logs of the core and of every installed plugin to stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_core.infra.library_logs import log_libraries_at_debug
from rlhf_core.infra.log import LOGGER, SHIPPED, ShownOnce, log_to_stderr, stderr_handler
from rlhf_core.registry.discovery import LOCAL
from rlhf_core.registry.resolve import find


def setup_logging(level: int | str = logging.INFO, *, rank: int = 0) -> logging.Logger:
    """Send the logs of the core and of installed plugins to stderr; return the core's logger.

    Calling it again replaces the handlers that it added before; all other loggers stay as they are.

    Args:
        level: the lowest level that is shown.
        rank: this process's number in a distributed run; all but rank 0 show warnings and errors only.
    """
    return log_to_stderr(plugin_packages(), level, rank=rank)


@contextmanager
def shown_logs(level: int = logging.INFO, *, rank: int = 0) -> Iterator[None]:
    """Show the logs of the core and of plugins on stderr within the `with` block, where nothing shows them yet.

    A program that has set up logging so that they are seen, by `setup_logging` or by a root logger of that level, keeps what it
    has. What reaches the root logger's handlers, such as warnings, goes there, and not to stderr as well.

    Args:
        level: the lowest level that is shown.
        rank: as in `setup_logging`.
    """
    core, root = logging.getLogger(LOGGER), logging.getLogger()
    if core.handlers or (root.handlers and core.isEnabledFor(level)):
        yield
        return
    handler = ShownOnce(stderr_handler(rank=rank), core.getEffectiveLevel())
    loggers = [logging.getLogger(name) for name in (LOGGER, *plugin_packages())]
    before = [(logger.level, logger.propagate) for logger in loggers]
    undo = log_libraries_at_debug()
    try:
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(level)
            logger.propagate = False
        yield
    finally:
        for logger, (was, propagates) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(was)
            logger.propagate = propagates
        undo()


def plugin_packages() -> list[str]:
    """Return the top-level packages of installed plugins, under which their modules log. Imports none of them."""
    installed = (plugin for plugin in find() if plugin.distribution != LOCAL)
    names = {plugin.target.partition(":")[0].partition(".")[0].strip() for plugin in installed}
    # Without the root logger, whose name is "", and the core's, which has a handler.
    return sorted((names | {SHIPPED}) - {"", LOGGER})
