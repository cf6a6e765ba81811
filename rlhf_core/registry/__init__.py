"""Methods by name: find (nothing imported) → policy → load.

A plugin is a class behind an entry point of one of the groups `rlhf_core.trainers`, `.rewards`, `.samplers`, `.mergers` and
`.hooks`, in any installed distribution; those that ship with the core have no privilege. `find` reads only metadata and source
text, so a broken plugin is listed with its reason and harms no other. `get` imports the one class that is asked for; `check`
imports all of them in another process. Installed distributions are scanned once per process, and again when `sys.path` or a
scanned file has changed.

Two environment variables filter plugins; each is a comma-separated list of names, qualified names (`acme-rlhf:dpo`) and
distributions. `RLHF_PLUGINS_DISABLE` disables plugins; where `RLHF_PLUGINS_ALLOW` is set, all that it doesn't name are disabled.
Child processes inherit both.
"""

from __future__ import annotations

from rlhf_core.registry.discovery import LOCAL, Plugin
from rlhf_core.registry.resolve import (
    ALLOW_VARIABLE,
    DISABLE_VARIABLE,
    DISTRIBUTION,
    KINDS,
    UnknownPlugin,
    View,
    ask,
    check,
    faults,
    find,
    forget,
    get,
    load,
    lookup,
    mergers,
    only_this_distribution,
    parse_kind,
    register,
    rewards,
    samplers,
    trainers,
    unmatched_policy,
    unregister,
)

__all__ = [
    "ALLOW_VARIABLE",
    "DISABLE_VARIABLE",
    "DISTRIBUTION",
    "KINDS",
    "LOCAL",
    "Plugin",
    "UnknownPlugin",
    "View",
    "ask",
    "check",
    "faults",
    "find",
    "forget",
    "get",
    "load",
    "lookup",
    "mergers",
    "only_this_distribution",
    "parse_kind",
    "register",
    "rewards",
    "samplers",
    "trainers",
    "unmatched_policy",
    "unregister",
]
