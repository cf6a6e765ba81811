"""Open the rewards of a run: from names, functions, classes, objects and configurations to `Rewards`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ValidationError

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig, config_error, place_of
from rlhf_core.config.online import OnlineConfig, RewardConfig
from rlhf_core.contracts.reward import RewardFn
from rlhf_core.infra.errors import ConfigError, Mistakes, PluginError, RLHFError, describe_error, shortened
from rlhf_core.infra.import_object import import_object
from rlhf_core.registry.distributions import canonical
from rlhf_core.rewards.function_reward import FunctionReward, RewardFunction
from rlhf_core.rewards.reward_process import ProcessReward
from rlhf_core.rewards.score_checks import name_of
from rlhf_core.rewards.scoring import Rewards
from rlhf_core.rewards.session import WeightedReward

RewardLike = RewardFn | type[RewardFn] | RewardFunction | RewardConfig | str | Mapping[str, Any] | tuple[Any, float]
"""All that is accepted as one reward; a tuple is a reward and its weight."""


def open_rewards(given: Sequence[RewardLike] | RewardLike, *, place: Mapping[str, str] | str = "rewards") -> Rewards:
    """Return the rewards of a run, made but not prepared: no model is loaded and nothing is scored.

    A name is that of a plugin (`exact_match`, `acme:exact_match`), or of a function or class: `package.module:function`,
    `path/to/file.py:function`. A reward of weight 0 is logged and not trained on.

    Args:
        given: one reward or several, each alone or as (reward, weight); an empty list raises only once something is scored.
        place: where they were configured, for messages: one text, or one per dotted key (`rewards.0.options.threshold`).

    Raises:
        ConfigError: a name, module, attribute or option doesn't exist (the message has the nearest), an option has the wrong
            type, or all weights are 0.
        PluginError: a plugin is broken, ambiguous or disabled, or importing or making a reward raised.
    """
    return Rewards([one.open() for one in _resolve_all(given, place)])


def open_reward(given: RewardLike) -> RewardFn:
    """Return one reward, made but not prepared, as it is: it runs wherever its `score` is called.

    Raises:
        ConfigError: as `open_rewards`.
        PluginError: as `open_rewards`.
    """
    (resolved,) = _resolve_all([given], "reward")
    return resolved.make_reward()


def options_of(name: str, *, place: str) -> type[BaseConfig] | None:
    """Return the configuration class of the reward that a name means; None for a function, whose options are its arguments.

    Raises:
        ConfigError: there is no such reward.
        PluginError: it is broken, ambiguous or disabled.
    """
    found = _found(name, place)
    return found.Config if isinstance(found, type) and issubclass(found, RewardFn) else None


def check_rewards(config: OnlineConfig, *, place: Mapping[str, str] | str = "rewards") -> None:
    """Check the rewards of a configuration as `open_rewards` would, without making any: modules are imported, no more.

    Raises:
        ConfigError: as `open_rewards`, or no rewards are configured and the method needs some.
        PluginError: as `open_rewards`.
    """
    if not config.rewards and config.needs_rewards:
        known = ", ".join(registry.rewards) or "none is installed"
        fix = f"set `rewards`, a list of names ({known}) or of functions, `FILE.py:function`"
        raise ConfigError("no rewards are given", place=_at("rewards", place), fix=fix)
    _resolve_all(config.rewards, place)


def mistakes_beside(given: Any, *, place: Mapping[str, str]) -> Mistakes:
    """Return what is wrong with rewards of which some have wrong keys, but for those keys: unknown names, wrong options.

    Args:
        given: the list as a file has it.
        place: for each dotted key that was set, where.
    """
    mistakes = Mistakes()
    for number, one in enumerate(given if isinstance(given, list) else [given]):
        if not isinstance(one, str | Mapping):
            continue
        whole = {"name": one} if isinstance(one, str) else one
        config, _, _ = RewardConfig.parse_sound(whole, place=place, instead={})
        if config is not None:
            with mistakes.noted():
                _resolve(config, f"rewards.{number}", place)
    return mistakes


def check_given(given: Sequence[RewardLike] | RewardLike, *, place: Mapping[str, str] | str = "rewards") -> None:
    """Check rewards as `open_rewards` would, without making any: modules are imported, no more.

    Raises:
        ConfigError: as `open_rewards`.
        PluginError: as `open_rewards`.
    """
    _resolve_all(given, place)


@dataclass(frozen=True)
class _Resolved:
    """A reward that was found and whose options are valid, before it is made."""

    name: str
    make: Callable[[], RewardFn]
    weight: float = 1.0
    time_limit: float | None = RewardConfig.model_fields["time_limit"].default
    place: str = "rewards"
    origin: Mapping[str, str] = field(default_factory=dict)
    runs_in: Literal["auto", "main", "thread", "process"] = "auto"
    concurrency: int | None = None
    recipe: dict[str, Any] | None = None
    """`name` and `options`, from which another process makes the reward; None where it was given as an object."""

    def open(self) -> WeightedReward:
        """Make the reward; one that runs in processes is wrapped in what starts them.

        Raises:
            PluginError: its constructor raised, and no `RLHFError`.
        """
        reward = self.make_reward()
        entry = WeightedReward(
            self.name, reward, self.weight, self.time_limit, self.origin, self.runs_in, self.concurrency
        )
        if entry.place != "process":
            return entry
        limit, name, place = self.time_limit, self.name, self.place
        return replace(entry, reward=ProcessReward(reward, self.recipe, time_limit=limit, name=name, place=place))

    def make_reward(self) -> RewardFn:
        try:
            return self.make()
        except RLHFError:
            raise
        except Exception as error:
            place = f"{self.place}, reward `{self.name}`"
            raise PluginError("making the reward raised an error", place=place, got=describe_error(error)) from error


def _resolve_all(given: Any, place: Mapping[str, str] | str) -> list[_Resolved]:
    """Resolve one reward or several; of those that share a name, the second is `NAME_2`. Of several mistakes the first is raised,
    the others are its `also`."""
    several = isinstance(given, Sequence) and not isinstance(given, str) and not _is_pair(given)
    found: list[_Resolved] = []
    taken: set[str] = set()
    mistakes = Mistakes()
    for number, one in enumerate(given if several else [given]):
        with mistakes.noted():
            found.append(_resolve(one, f"rewards.{number}", place))
    mistakes.raise_first()
    for number, resolved in enumerate(found):
        name, count = resolved.name, 1
        while name in taken:
            count += 1
            name = f"{resolved.name}_{count}"
        taken.add(name)
        found[number] = replace(resolved, name=name)
    if found and not any(one.weight for one in found):
        fix = "give one of them another weight"
        raise ConfigError(
            "every reward has a weight of 0, so there is nothing to train on", place=_at("rewards", place), fix=fix
        )
    return found


def _is_pair(given: Any) -> bool:
    """Tell whether a value is a tuple (reward, weight)."""
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float)


def _resolve(given: Any, key: str, place: Mapping[str, str] | str) -> _Resolved:
    """Resolve one reward; `key` is its dotted key in the configuration, such as `rewards.0`."""
    where = _at(key, place)
    if isinstance(given, tuple):
        if not _is_pair(given) or isinstance(given[1], bool) or not math.isfinite(given[1]):
            raise ConfigError("a tuple must be a reward and its weight", place=where, got=shortened(given))
        inner = _resolve(given[0], key, place)
        return replace(inner, weight=float(given[1]))
    if isinstance(given, str | Mapping):
        try:
            given = RewardConfig.model_validate(given)
        except ValidationError as error:
            raise config_error(RewardConfig, error, place, within=key) from None
    if isinstance(given, RewardConfig):
        return _configured(given, key, place)
    if isinstance(given, RewardFn):
        plugin = _plugin(type(given))
        name = name_of(given) if plugin is None or hasattr(given, "name") else plugin.name
        return _Resolved(name, lambda: given, place=where, origin=_origin(plugin))
    if isinstance(given, type) and issubclass(given, RewardFn):
        plugin = _plugin(given)
        return _of_class(given, given.__name__ if plugin is None else plugin.name, {}, key, place)
    if hasattr(given, "forward") and hasattr(given, "parameters"):
        fix = "wrap it: `RewardModelReward.of(model)`, or a function that encodes the texts and calls it"
        raise ConfigError("a model alone is not a reward", place=where, got=type(given).__name__, fix=fix)
    if callable(given) and not isinstance(given, type):
        reward = FunctionReward(given)
        return _Resolved(reward.name, lambda: reward, place=where)
    fix = "give a name, a function, a RewardFn, or a RewardConfig"
    raise ConfigError("is not a reward", place=where, got=shortened(given), fix=fix)


def _configured(config: RewardConfig, key: str, place: Mapping[str, str] | str) -> _Resolved:
    """Resolve a reward by the name in its configuration: a plugin, else `module:attribute`."""
    where = _at(f"{key}.name", place)
    plugin: registry.Plugin | None = None
    try:
        plugin = registry.lookup(config.name, "reward")
        found = registry.load(plugin)
    except registry.UnknownPlugin as unknown:
        found = _named(config.name, unknown, where)
    name = plugin.name if plugin is not None else config.name.rpartition(":")[2].rpartition(".")[2]
    options = config.options
    if isinstance(found, type) and issubclass(found, RewardFn):
        one = _of_class(found, name, options, key, place)
        if plugin is not None:
            one = replace(one, origin=_origin(plugin))
    elif isinstance(found, RewardFn):
        if options:
            problem = f"`{config.name}` is an instance of a reward already, so it takes no options"
            raise ConfigError(problem, place=_at(f"{key}.options", place), fix="name its class, or leave them out")
        one = _Resolved(name, lambda: found, place=where, origin=_origin(_plugin(type(found))))
    elif callable(found) and not isinstance(found, type):
        reward = FunctionReward(found, options, place=lambda option: _at(f"{key}.options.{option}", place))
        one = _Resolved(name, lambda: reward, place=where)
    else:
        problem = f"`{config.name}` is neither a function nor a class of RewardFn"
        raise ConfigError(problem, place=where, got=shortened(found))
    return replace(
        one,
        weight=config.weight,
        time_limit=config.time_limit,
        runs_in=config.runs_in,
        concurrency=config.concurrency,
        recipe={"name": config.name, "options": dict(options)},
    )


def _found(name: str, where: str) -> Any:
    """Return the class, function or object that a reward's name means.

    Raises:
        ConfigError: there is none.
        PluginError: a plugin is broken, ambiguous or disabled.
    """
    try:
        return registry.load(registry.lookup(name, "reward"))
    except registry.UnknownPlugin as unknown:
        return _named(name, unknown, where)


def _named(name: str, unknown: registry.UnknownPlugin, where: str) -> Any:
    """Return the object that `module:attribute` names, where no plugin has that name.

    Raises:
        ConfigError: there is no such object; `unknown` has the plugins' names.
    """
    head, colon, _ = name.rpartition(":")
    if not colon:
        module, dot, attribute = name.rpartition(".")
        fix: str | None
        if attribute == "py":
            fix = f"name a function in the file: `{name}:FUNCTION`"
        else:
            fix = f"write `{module}:{attribute}` for a function of a module; {unknown.fix}" if dot else unknown.fix
        raise ConfigError(unknown.problem, place=where, fix=fix)
    try:
        return import_object(name, place=where)
    except ConfigError as error:
        # `acme:exat` may be a slip in a plugin's qualified name as well.
        if any(canonical(plugin.distribution) == canonical(head) for plugin in registry.find("reward")):
            raise ConfigError(unknown.problem, place=where, fix=unknown.fix) from None
        raise ConfigError(
            f"unknown reward `{name}`: {error.problem}", place=where, got=None, fix=error.fix or unknown.fix
        ) from None


def _of_class(
    cls: type[RewardFn], name: str, options: Mapping[str, Any], key: str, place: Mapping[str, str] | str
) -> _Resolved:
    """Resolve a class of rewards, its options validated by its `Config`."""
    where = _at(key, place)
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise PluginError(f"the reward doesn't define `{missing[0]}`", place=f"{where}, reward `{name}`")
    try:
        config = cls.Config.model_validate(dict(options))
    except ValidationError as error:
        raise config_error(cls.Config, error, place, within=f"{key}.options") from None
    return _Resolved(name, lambda: cls(config), place=where, origin=_origin(_plugin(cls)))


def _plugin(cls: type) -> registry.Plugin | None:
    """Return the reward plugin whose entry point names this class, if there is one."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((plugin for plugin in registry.find("reward") if plugin.target == target), None)


def _origin(plugin: registry.Plugin | None) -> dict[str, str]:
    """Return a plugin's distribution and version; {} where there is no plugin."""
    return {} if plugin is None else {"distribution": plugin.distribution, "version": plugin.version}


def _at(key: str, place: Mapping[str, str] | str) -> str:
    """Return where a dotted key such as `rewards.0.options` was set, for messages."""
    return f"{place}{key.removeprefix('rewards')}" if isinstance(place, str) else place_of(key, place)
