"""Send the logs of the core and of every installed plugin to stderr."""

from __future__ import annotations

import logging

from rlhf_core.infra.log import LOGGER, SHIPPED, log_to_stderr
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


def plugin_packages() -> list[str]:
    """Return the top-level packages of installed plugins, under which their modules log. Imports none of them."""
    installed = (plugin for plugin in find() if plugin.distribution != LOCAL)
    names = {plugin.target.partition(":")[0].partition(".")[0].strip() for plugin in installed}
    # Without the root logger, whose name is "", and the core's, which has a handler.
    return sorted((names | {SHIPPED}) - {"", LOGGER})
