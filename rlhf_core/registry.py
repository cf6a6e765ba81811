"""Methods by name: find (nothing imported) → policy → load.

A plugin is a class behind an entry point of a group `rlhf_core.trainers`, `.rewards`, `.samplers`, `.mergers` or `.hooks`, in
any installed distribution; those that ship with the core have no privilege. `find` reads metadata and source text alone, so
a broken plugin is listed with its reason and harms no other. `get` imports the one class that is asked for.

Two comma lists in the environment hold names, qualified names (`acme-rlhf:dpo`) or distributions: `RLHF_PLUGINS_DISABLE`
takes plugins out, and where `RLHF_PLUGINS_ALLOW` is set, only what it names stays. Child processes inherit both.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rlhf_core import API
from rlhf_core.discovery import GROUPS, Plugin, canonical, fold, installed
from rlhf_core.errors import ConfigError, PluginError, RLHFError, did_you_mean
from rlhf_core.header import split_target
from rlhf_core.records import RECORDS

DISTRIBUTION = "rlhf-core"
LOCAL = "local"
"""The distribution of what `register` adds in this process."""

KINDS = tuple(GROUPS)
DISABLE_VARIABLE, ALLOW_VARIABLE = "RLHF_PLUGINS_DISABLE", "RLHF_PLUGINS_ALLOW"


class UnknownPlugin(ConfigError, KeyError):
    """No plugin of that kind bears the name."""


_registered: dict[tuple[str, str], tuple[str, Any]] = {}
"""What `register` added: (kind, folded name) → the name as given and the object."""
_failed: dict[tuple[str, str], tuple[str, str]] = {}
"""Loads that failed in this process: (qualified, target) → status and reason."""


def find(kind: str | None = None) -> list[Plugin]:
    """List the plugins of one kind, or of all, sorted by kind and name. Imports none of them."""
    kinds = KINDS if kind is None else (parse_kind(kind),)
    there = installed(kinds)
    found = [plugin for one in kinds for plugin in _resolved([*there[one], *_local(one)])]
    return sorted(found, key=lambda plugin: (KINDS.index(plugin.kind), plugin.name, plugin.qualified))


def get(kind: str, name: str) -> Any:
    """Return the class of that kind and name; the name may be qualified, `distribution:name`.

    Raises:
        UnknownPlugin: no such name (a `ConfigError`, with the nearest and all of the kind).
        PluginError: it is ambiguous, disabled, broken, or written for other contracts.
    """
    return load(lookup(name, kind=kind))


def lookup(text: str, kind: str | None = None) -> Plugin:
    """Return the one plugin that `[kind:][distribution:]name` means; nothing is imported. Raises as `get` does."""
    head, colon, rest = text.partition(":")
    if colon and _kind_of(head) and kind in (None, _kind_of(head)):
        kind, text = _kind_of(head), rest
    distribution, colon, name = text.rpartition(":")
    candidates = find(kind)
    named = [p for p in candidates if fold(p.name) == fold(name)]
    if colon:
        named = [p for p in named if canonical(p.distribution) == canonical(distribution)]
    if not named:
        known = {p.qualified if colon else p.name for p in candidates}
        what = kind or "plugin"
        raise UnknownPlugin(f"unknown {what} `{text}`", place="registry", fix=did_you_mean(text, known))
    kinds = sorted({p.kind for p in named}, key=KINDS.index)
    if len(kinds) > 1:
        forms = " or ".join(f"`{one}:{name}`" for one in kinds)
        raise ConfigError(f"`{name}` is the name of several kinds", place="registry", fix=f"write {forms}")
    enabled = [p for p in named if p.status != "disabled"] or named
    conflicting = [p for p in enabled if p.status == "conflict"]
    if conflicting and (not colon or len(enabled) > 1):
        raise PluginError(
            conflicting[0].reason, place=f"{conflicting[0].kind} `{name}`", fix=_fix_conflict(conflicting)
        )
    # A name that only broken plugins offer is reported as the first of them.
    return min(enabled, key=lambda p: p.status not in ("ok", "conflict"))


def load(plugin: Plugin) -> Any:
    """Import a plugin's class and check it against its kind's contract.

    A failure is remembered for `find` to list; the next load tries again, for the module may have been mended.
    """
    if plugin.distribution == LOCAL:
        return _registered[plugin.kind, fold(plugin.name)][1]
    failed_before = _failed.pop((plugin.qualified, plugin.target), None) is not None
    if plugin.status not in ("ok", "conflict") and not failed_before:
        raise _fault(plugin)
    try:
        module, name = split_target(plugin.target)
        loaded: Any = importlib.import_module(module)
        for part in name.split(".") if name else ():
            loaded = getattr(loaded, part)
    except (Exception, SystemExit) as error:
        raise _remember(plugin, "broken", f"importing it raised {type(error).__name__}: {error}") from error
    if (fault := _contract_fault(plugin.kind, loaded)) is not None:
        raise _remember(plugin, *fault)
    return loaded


def register(kind: str, name: str, cls: Any) -> None:
    """Offer a class (for a hook, any object) under a name in this process only; the same name again replaces it.

    It is listed under the distribution `local`; a name that an installed plugin bears too is then ambiguous.
    """
    kind = parse_kind(kind)
    if not name or ":" in name:
        raise ConfigError("a plugin's name is not empty and has no colon", place="register", got=repr(name))
    if (fault := _contract_fault(kind, cls)) is not None:
        raise PluginError(fault[1], place=f"{kind} `{name}`", got=repr(cls))
    _registered[kind, fold(name)] = (name, cls)


def unregister(kind: str, name: str) -> None:
    """Take back what `register` added; nothing where it isn't there."""
    _registered.pop((parse_kind(kind), fold(name)), None)


def forget() -> None:
    """Forget every registration and every load that failed."""
    _registered.clear()
    _failed.clear()


def parse_kind(text: str) -> str:
    """Return the kind that a user means: singular or plural."""
    kind = _kind_of(text)
    if kind is None:
        raise ConfigError(f"unknown kind of plugin `{text}`", place="registry", fix=did_you_mean(text, KINDS))
    return kind


def unmatched_policy() -> list[tuple[str, str]]:
    """Return (variable, entry) for each entry of the two policy variables that matches no plugin: likely a typing slip."""
    plugins = find()
    return [
        (variable, entry)
        for variable in (DISABLE_VARIABLE, ALLOW_VARIABLE)
        for entry in _entries(variable)
        if not any(_matches(entry, plugin) for plugin in plugins)
    ]


class View(Mapping[str, Any]):
    """The usable plugins of one kind as a mapping from name to class: `registry.trainers["dpo"]`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getitem__(self, name: str) -> Any:
        return get(self.kind, name)

    def __iter__(self) -> Iterator[str]:
        return iter([plugin.name for plugin in find(self.kind) if plugin.status == "ok"])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and lookup(name, self.kind).status in ("ok", "conflict")
        except RLHFError:
            return False

    def __repr__(self) -> str:
        return f"registry.{self.kind}s({', '.join(self)})"


trainers, rewards, samplers, mergers = View("trainer"), View("reward"), View("sampler"), View("merger")


def _local(kind: str) -> list[Plugin]:
    plugins = []
    for (one, _), (name, obj) in _registered.items():
        if one == kind:
            cls = obj if isinstance(obj, type) else type(obj)
            summary = (inspect.getdoc(obj) or "").strip().split("\n")[0]
            record, api = getattr(obj, "record", None), getattr(obj, "api", None)
            target = f"{cls.__module__}:{cls.__qualname__}"
            plugins.append(Plugin(kind, name, f"{LOCAL}:{name}", LOCAL, "", summary, record, api, "ok", "", target))
    return plugins


# Policy


def _resolved(plugins: list[Plugin]) -> list[Plugin]:
    """Settle each plugin's status: disabled first, then conflicts among the rest, then loads that failed."""
    plugins = [_filtered(plugin) for plugin in plugins]
    same: dict[str, list[Plugin]] = defaultdict(list)
    for plugin in plugins:
        # A broken offer takes nobody's name away; several hooks may share a name, for all of them listen.
        if plugin.status == "ok" and plugin.kind != "hook":
            same[fold(plugin.name)].append(plugin)
    resolved = []
    for plugin in plugins:
        rivals = same.get(fold(plugin.name), [])
        if plugin.status == "ok" and len(rivals) > 1:
            plugin = replace(plugin, status="conflict", reason=_conflict_reason(rivals))
        failed = _failed.get((plugin.qualified, plugin.target))
        if plugin.status in ("ok", "conflict") and failed:
            plugin = replace(plugin, status=failed[0], reason=failed[1])
        resolved.append(plugin)
    return resolved


def _conflict_reason(rivals: list[Plugin]) -> str:
    offers = sorted(f"`{plugin.qualified}` ({plugin.target})" for plugin in rivals)
    return f"the name is offered {len(rivals)} times: {' and '.join(offers)}"


def _fix_conflict(rivals: list[Plugin]) -> str:
    forms = sorted({fold(plugin.qualified): plugin.qualified for plugin in rivals}.values())
    if len(forms) == 1:
        return f"uninstall {rivals[0].distribution}, whose entry points name it twice"
    return f"write {' or '.join(f'`{form}`' for form in forms)}, or set {DISABLE_VARIABLE}={forms[0]}"


def _filtered(plugin: Plugin) -> Plugin:
    entry = next((entry for entry in _entries(DISABLE_VARIABLE) if _matches(entry, plugin)), None)
    if entry is not None:
        return replace(plugin, status="disabled", reason=f"{DISABLE_VARIABLE} names `{entry}`")
    allowed = _entries(ALLOW_VARIABLE)
    if allowed and plugin.distribution != LOCAL and not any(_matches(entry, plugin) for entry in allowed):
        return replace(plugin, status="disabled", reason=f"{ALLOW_VARIABLE} doesn't name it")
    return plugin


def _entries(variable: str) -> list[str]:
    return [entry.strip() for entry in os.environ.get(variable, "").split(",") if entry.strip()]


def _matches(entry: str, plugin: Plugin) -> bool:
    distribution, colon, name = entry.rpartition(":")
    same_name = fold(name) == fold(plugin.name)
    if colon:
        return same_name and canonical(distribution) == canonical(plugin.distribution)
    return same_name or canonical(entry) == canonical(plugin.distribution)


def only_this_distribution() -> None:
    """Allow the core's own plugins only, in this process and those that it starts (`--no-plugins`)."""
    os.environ[ALLOW_VARIABLE] = DISTRIBUTION


def _kind_of(text: str) -> str | None:
    kind = text.strip().casefold().removesuffix("s")
    return kind if kind in GROUPS else None


# Load


def _contract_fault(kind: str, cls: Any) -> tuple[str, str] | None:
    """Tell what keeps a loaded object from being a plugin of that kind: (status, reason)."""
    if kind == "hook":
        return None
    from rlhf_core.config import BaseConfig, TrainerConfig
    from rlhf_core.interfaces import INTERFACES

    interface = INTERFACES[kind]
    if not (isinstance(cls, type) and issubclass(cls, interface)):
        return "broken", f"not a subclass of rlhf_core.{interface.__name__}"
    if (missing := sorted(getattr(cls, "__abstractmethods__", ()))) != []:
        return "broken", f"doesn't define {', '.join(f'`{name}`' for name in missing)}"
    base = TrainerConfig if kind == "trainer" else BaseConfig
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, base)):
        return "broken", f"its `Config` is not a subclass of rlhf_core.{base.__name__}"
    if kind == "trainer" and getattr(cls, "record", None) not in RECORDS:
        return "broken", f"its `record` is not one of: {', '.join(sorted(RECORDS))}"
    api = getattr(cls, "api", None)
    if api != API:
        return "wrong-api", f"written for api {api}, not {API}"
    return None


def _remember(plugin: Plugin, status: str, reason: str) -> PluginError:
    _failed[plugin.qualified, plugin.target] = (status, reason)
    return _fault(replace(plugin, status=status, reason=reason))


def _fault(plugin: Plugin) -> PluginError:
    origin = f"{plugin.distribution} {plugin.version}".strip()
    fixes = {
        "disabled": f"change {DISABLE_VARIABLE} or {ALLOW_VARIABLE}, or leave out --no-plugins",
        "wrong-api": f"install a version of {plugin.distribution} that was written for api {API}",
    }
    return PluginError(
        f"{plugin.status}: {plugin.reason}",
        place=f"{plugin.kind} `{plugin.name}` of {origin} ({plugin.target})",
        fix=fixes.get(plugin.status, f"mend, update or uninstall {plugin.distribution}"),
    )
