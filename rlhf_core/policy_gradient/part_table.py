"""A table of the parts of one kind: functions by name, those of third parties included, and the check of their options."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from rlhf_core import registry
from rlhf_core.config.fields import alternatives, shown
from rlhf_core.infra.errors import ConfigError, PluginError, did_you_mean, shortened
from rlhf_core.infra.import_object import import_object
from rlhf_core.policy_gradient.part_checks import CheckedPart
from rlhf_core.registry.discovery import fold
from rlhf_core.registry.distributions import PART_KINDS, canonical

Part = Callable[..., Any]
"""A pure function. Its keyword-only parameters with a default are its options."""


class PartTable:
    """The parts of one kind, by name.

    A name is one of the core's, `mine` or `distribution:mine` for an entry point `KIND.mine` of the group `rlhf_core.parts`,
    what `register` added in this process, or a function as `package.module:function` or `path/to/file.py:function`.

    Args:
        kind: the first word of the entry points' names, such as `advantage`.
        about: what such a part decides, with some names: the description of an option that picks one.
    """

    def __init__(self, kind: str, about: str) -> None:
        assert kind in PART_KINDS, kind
        self.kind, self.about = kind, about
        self._own: dict[str, Part] = {}

    def own(self, function: Part) -> Part:
        """Add a part of the core's under the function's name; used as a decorator."""
        self._own[function.__name__] = function
        return function

    def register(self, name: str, function: Part | None = None) -> Any:
        """Add a part in this process, as `registry.register` does for methods; without a function, return a decorator.

        Raises:
            ConfigError: the name isn't valid, or the core has a part of that name.
            PluginError: what is given isn't a function.
        """
        if function is None:
            return functools.partial(self._registered, name)
        return self._registered(name, function)

    def field(self, default: str | None, *, null: str = "the method's own") -> Any:
        """Return the field of a configuration that names a part of this kind.

        Args:
            default: a name; None leaves it open.
            null: which part is used where it is left open, for the description.
        """
        left_open = f"; null takes {null}." if default is None else "."
        description = f"{self.about} A name, or a function as `package.module:function`{left_open}"
        return Field(default, min_length=1, description=description)

    def options_field(self, *, null: str | None = None) -> Any:
        """Return the field for the options of the part that `field` names.

        Args:
            null: whose options are taken first for those left out, for the description.
        """
        defaults = f"{null}, or the part's defaults" if null else "the part's defaults"
        return Field(default_factory=dict, description=f"Options of the {self.kind}; those left out are {defaults}.")

    def names(self) -> list[str]:
        """Return the names of all usable parts, sorted; nothing is imported."""
        return sorted({*self._own, *self._third_party()})

    def get(self, name: str, *, place: str | None = None) -> Part:
        """Return the function that a name means.

        Args:
            place: where the name was given, for messages.

        Raises:
            ConfigError: there is none; the message has the nearest.
            PluginError: the name is ambiguous, or what it names is broken or disabled.
        """
        where = place or self.kind
        distribution, colon, alone = name.rpartition(":")
        own = None if colon else self._own.get(fold(name))
        qualified = f"{distribution}:{self.kind}.{alone}" if colon else f"{self.kind}.{name}"
        try:
            found = registry.lookup(qualified, "part")
        except registry.UnknownPlugin:
            if own is not None:
                return own
            return self._function(name, where) if colon else self._unknown(name, where)
        if own is not None:
            if found.status != "ok":  # what can't be used is no rival of the core's
                return own
            fix = f"write `{found.distribution}:{name}` for the other, or uninstall or disable it"
            raise PluginError(
                f"both the core and {found.distribution} have a {self.kind} `{name}`", place=where, fix=fix
            )
        return registry.load(found)

    def options(self, name: str, given: Mapping[str, Any], *, place: str | None = None) -> dict[str, Any]:
        """Return a part's options checked and converted by the annotations of its keyword-only parameters.

        Raises:
            ConfigError: the part has no such option, or the value doesn't fit; as `get`.
            PluginError: as `get`.
        """
        function, where = self.get(name, place=place), place or self.kind
        known = option_parameters(function)
        hints = _hints(function)
        checked: dict[str, Any] = {}
        for key, value in given.items():
            if key not in known:
                fix = did_you_mean(key, known) if known else "leave it out: it has no options"
                raise ConfigError(
                    f"{self.kind} `{name}` has no option `{key}`", place=where, got=shortened(value), fix=fix
                )
            checked[key] = self._checked(name, key, value, hints.get(key, Any), where)
        return checked

    def bind(self, name: str, given: Mapping[str, Any], *, place: str | None = None) -> Part:
        """Return the part with its options set and its result checked at each call. Raises as `options` does."""
        function, options = self.get(name, place=place), self.options(name, given, place=place)
        own = function is self._own.get(fold(name))
        return CheckedPart(functools.partial(function, **options), self.kind, name, own)

    def shown(self, name: str, given: Mapping[str, Any]) -> str:
        """Return a part with all its options as text, `ppo (low 0.2, high 0.28)`. Raises as `options` does."""
        options = {**option_parameters(self.get(name)), **self.options(name, given)}
        listed = ", ".join(f"{key} {shown(value)}" for key, value in options.items())
        return f"{name} ({listed})" if listed else name

    def _checked(self, name: str, key: str, value: Any, kind: Any, place: str) -> Any:
        """Return an option's value as its type demands."""
        problem = f"option `{key}` of {self.kind} `{name}`"
        kinds = alternatives(kind)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ConfigError(f"{problem} must be a number", place=place, got=shortened(value))
        try:
            return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"].replace("Input should be", "must be")
            raise ConfigError(f"{problem}: {message}", place=place, got=shortened(value)) from None

    def _registered(self, name: str, function: Part) -> Part:
        if fold(name) in self._own:
            raise ConfigError(f"the core has a {self.kind} `{name}`", place="register", fix="choose another name")
        registry.register("part", f"{self.kind}.{name}", function)
        return function

    def _third_party(self) -> list[str]:
        prefix = f"{self.kind}."
        return [
            plugin.name.removeprefix(prefix)
            for plugin in registry.find("part")
            if plugin.name.startswith(prefix) and plugin.status == "ok"
        ]

    def _function(self, name: str, place: str) -> Part:
        """Return the function that `module:function` names, where no entry point has that name."""
        head = name.rpartition(":")[0]
        try:
            found = import_object(name, place=place)
        except ConfigError as error:
            if any(canonical(plugin.distribution) == canonical(head) for plugin in registry.find("part")):
                self._unknown(name, place)
            fix = error.fix or did_you_mean(name, self.names())
            raise ConfigError(f"unknown {self.kind} `{name}`: {error.problem}", place=place, fix=fix) from None
        if not callable(found):
            raise ConfigError(f"`{name}` isn't a function", place=place, got=shortened(found))
        return found

    def _unknown(self, name: str, place: str) -> typing.NoReturn:
        fix = did_you_mean(name.rpartition(":")[2], self.names())
        raise ConfigError(f"unknown {self.kind} `{name}`", place=place, fix=f"{fix}, or a function, `module:function`")


def option_parameters(function: Part) -> dict[str, Any]:
    """Return a part's options with their defaults: its keyword-only parameters that have one."""
    parameters = inspect.signature(function).parameters.values()
    return {
        one.name: one.default
        for one in parameters
        if one.kind is inspect.Parameter.KEYWORD_ONLY and one.default is not inspect.Parameter.empty
    }


def _hints(function: Part) -> dict[str, Any]:
    """Return the annotations of a function as types, bounds included; {} where they can't be resolved."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return typing.get_type_hints(
            function if inspect.isroutine(function) else type(function).__call__, include_extras=True
        )
    except Exception:  # an annotation with a name that exists for type checkers only
        return {}
