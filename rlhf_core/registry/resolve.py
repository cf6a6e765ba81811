"""Decide which plugin a name means, apply the policy, and load its class; see `rlhf_core.registry`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rlhf_core.infra.errors import ConfigError, PluginError, RLHFError, did_you_mean, shortened
from rlhf_core.infra.version import API
from rlhf_core.registry import discovery
from rlhf_core.registry.discovery import GROUPS, LOCAL, WITHOUT_CLASS, Plugin, fold
from rlhf_core.registry.distributions import EntryPoint, canonical, method_name_fault, part_name_fault

DISTRIBUTION = "rlhf-core"

KINDS = tuple(GROUPS)
DISABLE_VARIABLE, ALLOW_VARIABLE = "RLHF_PLUGINS_DISABLE", "RLHF_PLUGINS_ALLOW"


class UnknownPlugin(ConfigError, KeyError):
    """No plugin of that kind has the name."""


@dataclass(frozen=True)
class _Failure:
    """A load that failed. `fatal`: the import ended a process, so it isn't tried in this one."""

    status: str
    reason: str
    fatal: bool = False


T = TypeVar("T")
Key = tuple[str, str, str]

_registered: dict[tuple[str, str], tuple[Plugin, Any]] = {}
"""What `register` added: (kind, folded name) → the plugin and its object."""
_failed: dict[Key, _Failure] = {}
"""Loads that failed, by `Plugin.key`."""
_loaded: dict[Key, Mapping[str, Any]] = {}
"""Loads that succeeded, in this process or another, with summary, record, stage and api where the source didn't show them."""
_warned: set[tuple[Key, str]] = set()
"""Pairs of a plugin that a bare name means and a failed one of that name, about which the user was warned."""


def find(kind: str | None = None) -> list[Plugin]:
    """Return the plugins of one kind, or of all, sorted by kind and name. Imports none of them."""
    return _found(KINDS if kind is None else (parse_kind(kind),))


def get(kind: str, name: str) -> Any:
    """Return the class of that kind and name; the name may be qualified, `distribution:name`.

    An import that ends its process at once (`os._exit`, a crash in C code) ends this one; `check` imports in another process.

    Raises:
        UnknownPlugin: there is no such name (a `ConfigError` that lists the nearest and all names of the kind).
        PluginError: the plugin is ambiguous, disabled, broken, or written for another version of the contracts.
    """
    return load(lookup(name, kind=kind))


def lookup(text: str, kind: str | None = None) -> Plugin:
    """Return the one plugin that `[kind:][distribution:]name` means. Raises as `get` does.

    Nothing is imported in this process. Where several plugins have a bare name, they are imported in another process; if all
    but one fail there, the name means that one, and the user is warned.
    """
    head, colon, rest = text.partition(":")
    if colon and _kind_of(head) and kind in (None, _kind_of(head)):
        kind, text = _kind_of(head), rest
    kinds = KINDS if kind is None else (parse_kind(kind),)
    distribution, colon, name = text.rpartition(":")
    named = _named(kinds, name, distribution if colon else None)
    if not named:
        known = {one.qualified if colon else one.name for one in _everything(kinds) if not method_name_fault(one.name)}
        raise UnknownPlugin(f"unknown {kind or 'plugin'} `{text}`", place="registry", fix=did_you_mean(text, known))
    of_kinds = sorted({p.kind for p in named}, key=KINDS.index)
    if len(of_kinds) > 1:
        forms = " or ".join(f"`{one}:{name}`" for one in of_kinds)
        raise ConfigError(f"`{name}` is the name of several kinds", place="registry", fix=f"write {forms}")
    if len([p for p in named if p.status == "conflict"]) > 1:
        with suppress(PluginError):  # where no process can be started, the name stays ambiguous
            _try_imports(named)
        named = _named(of_kinds, name, distribution if colon else None)
    return _chosen(named, name, qualified=bool(colon))


def load(plugin: Plugin) -> Any:
    """Import a plugin's class and check it against its kind's contract. What the import prints goes to stderr.

    `find` then shows a failure as the plugin's status. The next load tries again, for the module may have been mended, unless
    the import is known to end its process.

    Raises:
        PluginError: the plugin is disabled, or the import or the check failed.
    """
    before = _failed.get(plugin.key)
    if before is not None and before.fatal:
        raise _fault(replace(plugin, status=before.status, reason=before.reason))
    if plugin.status not in ("ok", "conflict") and (before is None or plugin.status == "disabled"):
        raise _fault(plugin)
    if plugin.distribution == LOCAL:
        return _registered[plugin.kind, fold(plugin.name)][1]
    from rlhf_core.registry.load_class import LoadFault, describe_class, load_target

    try:
        loaded = load_target(plugin.kind, plugin.target)
    except LoadFault as fault:
        _remember(plugin, _Failure(fault.status, fault.reason))
        raise _fault(replace(plugin, status=fault.status, reason=fault.reason)) from fault.__cause__
    _remember(plugin, {} if plugin.kind in WITHOUT_CLASS or plugin.api is not None else describe_class(loaded))
    return loaded


def ask(plugin: Plugin, question: Callable[[Any], T]) -> T:
    """Load a plugin's class and return `question(class)`, guarded as the import is.

    Raises:
        PluginError: the class can't be loaded, or `question` raised.
    """
    from rlhf_core.registry.guarded import GuardedError, run_guarded

    loaded = load(plugin)
    try:
        return run_guarded(lambda: question(loaded))
    except GuardedError as fault:
        reason = f"its class can't be described: that raised {fault}"
        raise _fault(replace(plugin, status="broken", reason=reason)) from fault.__cause__


def check(kind: str | None = None, *, seconds: float | None = None) -> list[Plugin]:
    """Import the plugins of one kind, or of all, in another process, and return them with the status that this showed.

    An import that exits, crashes or takes longer than `seconds` (None: 60) makes its plugin `broken`.
    """
    kinds = KINDS if kind is None else (parse_kind(kind),)
    for key in [key for key in _failed if key[0] in kinds]:
        del _failed[key]
    _try_imports(_found(kinds), seconds, again=True)
    return _found(kinds)


def register(kind: str, name: str, cls: Any) -> None:
    """Add a class (for a hook any object, for a part a function) as a plugin in this process only; the same name again
    replaces it.

    Its distribution is `local`; a name that an installed plugin has as well is ambiguous from then on.

    Raises:
        ConfigError: the name isn't valid.
        PluginError: the class doesn't fulfil the contract of its kind.
    """
    from rlhf_core.registry.load_class import contract_fault, describe_class

    kind = parse_kind(kind)
    if reason := method_name_fault(name) or (part_name_fault(name) if kind == "part" else ""):
        raise ConfigError(reason, place="register", fix="choose another name")
    if (fault := contract_fault(kind, cls)) is not None:
        raise PluginError(fault[1], place=f"{kind} `{name}`", got=_shown(cls))
    named = cls if isinstance(cls, type) or kind == "part" else type(cls)
    named = named if hasattr(named, "__qualname__") else type(named)
    target = f"{named.__module__}:{named.__qualname__}"
    plugin = Plugin(
        kind, name, f"{LOCAL}:{name}", LOCAL, "", status="ok", reason="", target=target, **describe_class(cls)
    )
    _registered[kind, fold(name)] = (plugin, cls)


def unregister(kind: str, name: str) -> None:
    """Remove what `register` added, if it is there."""
    _registered.pop((parse_kind(kind), fold(name)), None)


def forget() -> None:
    """Drop every registration, every remembered load and the scan of installed distributions, which the next call makes
    again."""
    _registered.clear()
    _failed.clear()
    _loaded.clear()
    _warned.clear()
    discovery.forget()


def parse_kind(text: str) -> str:
    """Return the kind that a singular or plural word names: `trainers` → `trainer`."""
    kind = _kind_of(text)
    if kind is None:
        raise ConfigError(f"unknown kind of plugin `{text}`", place="registry", fix=did_you_mean(text, KINDS))
    return kind


def faults() -> list[str]:
    """Return what is wrong with installed distributions themselves, and so with no single plugin, a line each.

    Two distributions of one name, entry points that can't be read, groups that are misspelt.
    """
    return list(discovery.installed().faults)


def unmatched_policy() -> list[tuple[str, str]]:
    """Return (variable, entry) for each entry of the two policy variables that matches no plugin, probably a misspelling."""
    return [
        (variable, entry)
        for variable in (DISABLE_VARIABLE, ALLOW_VARIABLE)
        for entry in _entries(variable)
        if not any(_matches(entry, one) for one in _everything(KINDS))
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


# Find


def _found(kinds: Iterable[str], wanted: Callable[[Plugin | EntryPoint], bool] = lambda _: True) -> list[Plugin]:
    """Return the plugins of some kinds for which `wanted` holds, policy applied; only their sources are read."""
    plugins = [
        discovery.read_plugin(one) if isinstance(one, EntryPoint) else one for one in _everything(kinds) if wanted(one)
    ]
    of_kind: dict[str, list[Plugin]] = defaultdict(list)
    for plugin in plugins:
        of_kind[plugin.kind].append(plugin)
    resolved = [plugin for one in of_kind.values() for plugin in _resolved(one)]
    return sorted(resolved, key=lambda plugin: (KINDS.index(plugin.kind), plugin.name, plugin.qualified))


def _everything(kinds: Iterable[str]) -> list[Plugin | EntryPoint]:
    """Return the entry points of some kinds, their sources unread, and the registered plugins; no policy is applied."""
    kinds = tuple(kinds)
    everything: list[Plugin | EntryPoint] = [
        *discovery.installed().entry_points,
        *(plugin for plugin, _ in _registered.values()),
    ]
    return [one for one in everything if one.kind in kinds]


def _named(kinds: Iterable[str], name: str, distribution: str | None) -> list[Plugin]:
    """Return the plugins of a name, of one distribution where it is given. Conflicts with those of others still show."""
    named = _found(kinds, lambda one: fold(one.name) == fold(name))
    return [p for p in named if distribution is None or canonical(p.distribution) == canonical(distribution)]


# Policy


def _resolved(plugins: list[Plugin]) -> list[Plugin]:
    """Set the status of each plugin of one kind: disabled first, then loads that failed, then conflicts among the rest."""
    plugins = [_with_load(_filtered(plugin)) for plugin in plugins]
    same: dict[str, list[Plugin]] = defaultdict(list)
    for plugin in plugins:
        # A broken plugin is no rival; hooks may share a name, for all of them are called.
        if plugin.status == "ok" and plugin.kind != "hook":
            same[fold(plugin.name)].append(plugin)
    return [
        replace(plugin, status="conflict", reason=_conflict_reason(rivals))
        if plugin.status == "ok" and len(rivals := same.get(fold(plugin.name), [])) > 1
        else plugin
        for plugin in plugins
    ]


def _with_load(plugin: Plugin) -> Plugin:
    """Return a plugin with what an earlier load of it showed: a failure's status, or what its source didn't say."""
    failure, loaded = _failed.get(plugin.key), _loaded.get(plugin.key)
    if plugin.status == "ok" and failure is not None:
        return replace(plugin, status=failure.status, reason=failure.reason)
    return replace(plugin, reason="", **loaded) if plugin.status == "ok" and loaded else plugin


def _try_imports(plugins: Iterable[Plugin], seconds: float | None = None, *, again: bool = False) -> None:
    """Import plugins in another process and remember the outcomes; those that loaded before only where `again` is set."""
    from rlhf_core.registry.trial_import import SECONDS, try_imports

    tried = [
        plugin
        for plugin in plugins
        if plugin.status in ("ok", "conflict") and plugin.distribution != LOCAL and (again or plugin.key not in _loaded)
    ]
    verdicts = try_imports([(plugin.kind, plugin.target) for plugin in tried], SECONDS if seconds is None else seconds)
    for plugin, verdict in zip(tried, verdicts, strict=True):
        if verdict.status == "ok":
            _remember(plugin, {} if plugin.kind in WITHOUT_CLASS or plugin.api is not None else verdict.about)
        else:
            _remember(plugin, _Failure(verdict.status, verdict.reason, verdict.fatal))


def _remember(plugin: Plugin, outcome: _Failure | Mapping[str, Any]) -> None:
    """Keep the outcome of a load: a failure, or what a loaded class says where its source can't be read."""
    if isinstance(outcome, _Failure):
        _failed[plugin.key] = outcome
        _loaded.pop(plugin.key, None)
    else:
        _loaded[plugin.key] = outcome
        _failed.pop(plugin.key, None)


def _chosen(named: list[Plugin], name: str, *, qualified: bool) -> Plugin:
    """Return the plugin that a name means among those that have it; warn where the others were ruled out by failed loads.

    Raises:
        PluginError: several are usable, and the name doesn't say which.
    """
    enabled = [p for p in named if p.status != "disabled"] or named
    conflicting = [p for p in enabled if p.status == "conflict"]
    if len(conflicting) > 1 or (conflicting and not qualified):
        first = conflicting[0]
        raise PluginError(first.reason, place=f"{first.kind} `{name}`", fix=_fix_conflict(conflicting))
    # Where all are broken, the first of them is returned, and loading it says why.
    chosen = min(enabled, key=lambda p: p.status not in ("ok", "conflict"))
    for other in enabled:
        if chosen.status == "ok" and other.key in _failed and (chosen.key, other.qualified) not in _warned:
            import logging  # here, for importing it takes longer than all else that `rlhf show` does

            _warned.add((chosen.key, other.qualified))
            logging.getLogger(__name__).warning(
                "%s `%s` means `%s`, because `%s` is %s: %s",
                chosen.kind, name, chosen.qualified, other.qualified, other.status, other.reason,
            )  # fmt: skip
    return chosen


def _conflict_reason(rivals: list[Plugin]) -> str:
    """Return the reason of status `conflict`, with all plugins of the name."""
    named = sorted(f"`{plugin.qualified}` ({plugin.target})" for plugin in rivals)
    return f"the name is offered {len(rivals)} times: {' and '.join(named)}"


def _fix_conflict(rivals: list[Plugin]) -> str:
    """Return how to resolve a conflict: qualified names to write, or what to uninstall."""
    forms = sorted({fold(plugin.qualified): plugin.qualified for plugin in rivals}.values())
    if len(forms) == 1:
        return f"uninstall {rivals[0].distribution}, whose entry points name it twice"
    return f"write {' or '.join(f'`{form}`' for form in forms)}, or set {DISABLE_VARIABLE}={forms[0]}"


def _filtered(plugin: Plugin) -> Plugin:
    """Return a plugin, `disabled` where one of the two policy variables says so."""
    entry = next((entry for entry in _entries(DISABLE_VARIABLE) if _matches(entry, plugin)), None)
    if entry is not None:
        return replace(plugin, status="disabled", reason=f"{DISABLE_VARIABLE} names `{entry}`")
    allowed = _entries(ALLOW_VARIABLE)
    if allowed and plugin.distribution != LOCAL and not any(_matches(entry, plugin) for entry in allowed):
        return replace(plugin, status="disabled", reason=f"{ALLOW_VARIABLE} doesn't name it")
    return plugin


def _entries(variable: str) -> list[str]:
    return [entry.strip() for entry in os.environ.get(variable, "").split(",") if entry.strip()]


def _matches(entry: str, one: Plugin | EntryPoint) -> bool:
    """Tell whether an entry of a policy variable (name, `distribution:name` or distribution) means a plugin."""
    distribution, colon, name = entry.rpartition(":")
    same_name = fold(name) == fold(one.name)
    if colon:
        return same_name and canonical(distribution) == canonical(one.distribution)
    return same_name or canonical(entry) == canonical(one.distribution)


def only_this_distribution() -> None:
    """Disable all plugins but those that ship with the core, in this process and its children (`--no-plugins`)."""
    os.environ[ALLOW_VARIABLE] = DISTRIBUTION


def _kind_of(text: str) -> str | None:
    """Return the kind that a word names, or None."""
    kind = text.strip().casefold().removesuffix("s")
    return kind if kind in GROUPS else None


def _shown(thing: Any) -> str:
    """Return a value as Python writes it, shortened; its type's name where its `__repr__` raises."""
    try:
        return shortened(thing)
    except Exception:
        return type(thing).__name__


def _fault(plugin: Plugin) -> PluginError:
    """Return the error for a plugin that can't be used, from its status and reason."""
    origin = f"{plugin.distribution} {plugin.version}".strip()
    fixes = {
        "disabled": f"change {DISABLE_VARIABLE} or {ALLOW_VARIABLE}, or leave out --no-plugins",
        "wrong-api": f"install a version of {plugin.distribution} that was written for api {API}",
    }
    return PluginError(
        f"{plugin.status}: {plugin.reason}",
        place=f"{plugin.kind} `{plugin.name}` of {origin} ({plugin.target})",
        fix=fixes.get(plugin.status, f"repair, update or uninstall {plugin.distribution}"),
    )
