"""Logs of the core and of every installed plugin, for people."""

from __future__ import annotations

import logging

from rlhf_core.infra.log import LOGGER, SHIPPED, log_to_stderr
from rlhf_core.registry.discovery import LOCAL
from rlhf_core.registry.resolve import find


def setup_logging(level: int | str = logging.INFO, *, rank: int = 0) -> logging.Logger:
    """Send the log of the core and of installed plugins to stderr; return the core's logger.

    Processes but the first show warnings only. Calling it again replaces what it set up before; other loggers are left alone.
    """
    return log_to_stderr(plugin_packages(), level, rank=rank)


def plugin_packages() -> list[str]:
    """Return the top-level packages of installed plugins, under which their modules log. Imports none of them."""
    installed = (plugin for plugin in find() if plugin.distribution != LOCAL)
    names = {plugin.target.partition(":")[0].partition(".")[0].strip() for plugin in installed}
    # The root logger has the name "", and belongs to nobody; the core's own hooks need no second handler.
    return sorted((names | {SHIPPED}) - {"", LOGGER})
