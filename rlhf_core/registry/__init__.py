"""Methods by name: find (nothing imported) → policy → load.

A plugin is a class behind an entry point of a group `rlhf_core.trainers`, `.rewards`, `.samplers`, `.mergers` or `.hooks`, in
any installed distribution; those that ship with the core have no privilege. `find` reads metadata and source text alone, so
a broken plugin is listed with its reason and harms no other. `get` imports the one class that is asked for; `check` imports all
of them in another process. What is installed is read once, and again where `sys.path` or a file of it has changed.

Two comma lists in the environment hold names, qualified names (`acme-rlhf:dpo`) or distributions: `RLHF_PLUGINS_DISABLE`
takes plugins out, and where `RLHF_PLUGINS_ALLOW` is set, only what it names stays. Child processes inherit both.
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
