"""The method of a merge: its class, built once from the configuration, and the values of options that vary by layer or model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any

from pydantic import BaseModel, create_model

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.config.fields import alternatives
from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import ConfigError, PluginError, nearest
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.layer_values import LayerValues, Value, unused_filters, value_at
from rlhf_core.merging.merge_input import MergeInput, check_own
from rlhf_core.merging.plan import Plan
from rlhf_core.merging.tensor_names import GROUPS
from rlhf_core.registry.discovery import Plugin

log = logging.getLogger(__name__)


class MergeMethod:
    """The merger that a configuration names, and the weights and options of each model at each tensor.

    Args:
        config: the merge.
        place: where its keys were set, for messages.
        found: the plugin and the class that its `method` names, where they were looked up already.

    Raises:
        ConfigError: an option is unknown or invalid.
        PluginError: the merger is broken.
    """

    def __init__(
        self,
        config: MergeConfig,
        *,
        place: Mapping[str, str] | str = "config",
        found: tuple[Plugin, type[Merger]] | None = None,
    ) -> None:
        self.config = config
        self.plugin, self._class = found if found is not None else _look_up(config.method)
        if unknown := [name for name in self._class.per_model if name not in self._class.Config.model_fields]:
            raise PluginError(
                f"`per_model` names `{unknown[0]}`, which its configuration doesn't have",
                place=f"merger `{self.plugin.qualified}`",
                fix="mend the plugin",
            )
        self.evaluates = self._class.merge is not Merger.merge
        given = dict(config.options)
        if "seed" in self._class.Config.model_fields:
            given.setdefault("seed", config.seed)
        self._options = _Options(
            self._class, given, {"": place} if isinstance(place, str) else {"": "config"} | dict(place)
        )
        self._of_models = [self._model_options(number, given, place) for number in range(len(config.models))]
        self.merger = self._class(self._options.some())
        for options in self._of_models:
            options.some()
        self._mergers = {id(self.merger.config): self.merger}
        """By their configurations, of which `_options` keeps one for the same values."""

    def merger_at(self, merger: Merger, name: str, depth: int) -> Merger:
        """Return the merger with the values that its options have at a tensor; `merger` itself where none varies."""
        if merger is not self.merger:
            return merger
        config = self._options.at(name, depth)
        if id(config) not in self._mergers:
            self._mergers[id(config)] = self._class(config)
        return self._mergers[id(config)]

    def inputs_at(self, merger: Merger, plan: Plan, name: str) -> list[MergeInput]:
        """Return the plan's models with their weights and options at a tensor.

        Args:
            merger: `self.merger`, or another one that a method which overrides `merge` made, whose options then count.
            plan: the merge's.
            name: of the tensor.
        """
        found = []
        for number, (model, entry) in enumerate(zip(plan.models, self.config.models, strict=True)):
            weight = value_at(entry.weight, name, plan.depth, what=f"models[{number}].weight")
            config = self._of_models[number].at(name, plan.depth)
            if merger is not self.merger:
                config = merger.config.updated(**{option: getattr(config, option) for option in entry.options})
            options = MappingProxyType({option: getattr(config, option) for option in self._class.per_model})
            found.append(MergeInput(model.name, model.path, weight, options, number, model.fingerprint))
        return found

    def check(self, plan: Plan) -> None:
        """Compute every value once, so that an invalid one raises before any tensor is read."""
        names = [tensor.name for tensor in plan.tensors if tensor.merged]
        for what, value in self._values():
            for part in unused_filters(value, names):
                near = nearest(part, {piece for name in names for piece in name.split(".")[:-1]} | set(GROUPS))
                # A file for many models may name parts that this one doesn't have.
                if part in GROUPS or near is None:
                    log.warning("a filter of `%s` matches no tensor: `%s`", what, part)
                    continue
                raise ConfigError(
                    f"a filter of `{what}` matches no tensor",
                    place=what,
                    got=f"`{part}`",
                    fix=f"did you mean `{near}`?",
                )
        self.check_weights(plan, self.merger, range(len(plan.models)))

    def check_weights(self, plan: Plan, merger: Merger, chosen: Sequence[int]) -> None:
        """Raise where a method refuses the weights that some models have at a tensor, or an option is invalid there."""
        for tensor in plan.tensors:
            if tensor.merged:
                inputs = self.inputs_at(merger, plan, tensor.name)
                weights = [inputs[number].weight for number in chosen if tensor.models[number] is not None]
                self.merger_at(merger, tensor.name, plan.depth).check_weights(weights)

    def require_one_value(self) -> None:
        """Raise where a model's weight or one of its options varies by layer."""
        for what, value in self._values():
            if what.startswith("models[") and not isinstance(value, int | float):
                raise ConfigError(
                    f"`{self.config.method}` takes one value for a whole model", place=what, fix="give one number"
                )

    @property
    def files(self) -> list[Path]:
        """The files and directories that options name, those that exist."""
        configs = [self.merger.config, *(config for options in self._of_models for config in options.configs.values())]
        return sorted({path for path in _paths(configs) if path.exists()})

    def fingerprint_values(self, merger: Merger) -> dict[str, Any]:
        """Return what the output's bytes depend on besides the inputs, as JSON values."""
        given = self.config.model_dump(
            mode="json", include={"models", "options", "tokenizer", "pad_to_multiple_of", "dtype", "seed"}
        )
        for entry in given["models"]:
            del entry["model"]
        stats = [(str(path), path.stat()) for path in self.files]
        return {
            "method": self.plugin.qualified,
            "version": self.plugin.version,
            **given,
            "config": merger.config.model_dump(mode="json"),
            "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        }

    def _values(self) -> Iterator[tuple[str, Value]]:
        """Yield every value that may vary by layer, with its name."""
        yield from self._options.varying.items()
        for number, entry in enumerate(self.config.models):
            yield f"models[{number}].weight", entry.weight
            for option, value in self._of_models[number].varying.items():
                if option in entry.options:
                    yield f"models[{number}].{option}", value

    def _model_options(self, number: int, shared: Mapping[str, Any], place: Mapping[str, str] | str) -> _Options:
        """Return a model's options: its own, and for the others the method's."""
        entry, at, key = self.config.models[number], f"models[{number}]", f"models.{number}"
        set_at = {} if isinstance(place, str) else place
        places = {"": set_at.get(key, at)} | {name: f"{at}.{name}" for name in entry.options}
        start = f"{key}.options."
        places |= {name.removeprefix(start): one for name, one in set_at.items() if name.startswith(start)}
        for name in entry.options:
            check_own(name, self._class, self.config.method, places[name])
        owner = f"model {entry.model if isinstance(entry.model, str) else at}: "
        named = {name: f"{at}.{name}" for name in entry.options}
        return _Options(self._class, {**shared, **entry.options}, places, owner=owner, named=named)


def _look_up(name: str) -> tuple[Plugin, type[Merger]]:
    """Return the merger's plugin of a name, and its class."""
    plugin = registry.lookup(name, "merger")
    return plugin, registry.load(plugin)


class _Options:
    """Options of a method, which may vary by layer: a configuration for each tensor.

    Args:
        method: the merger's class.
        given: the options by name; a list or a group in place of a number says how it varies.
        places: where each option was set, by dotted key; under an empty key, where the others were.
        owner: what messages begin with, the model whose options they are.
        named: what messages call an option, where it isn't its name alone.
    """

    def __init__(
        self,
        method: type[Merger],
        given: Mapping[str, Any],
        places: Mapping[str, str],
        *,
        owner: str = "",
        named: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._method, self._places, self._owner, self._named = method, places, owner, named
        varying = {
            name: value
            for name, value in given.items()
            if isinstance(value, list | Mapping | LayerValues) and is_number(method, name)
        }
        fields: dict[str, Any] = dict.fromkeys(varying, (Value, ...))
        schema = create_model("ValuesByLayer", __base__=BaseConfig, **fields)
        self.varying: dict[str, Value] = dict(schema.parse(varying, place=places))
        self._fixed = {name: value for name, value in given.items() if name not in self.varying}
        self.configs: dict[tuple[float, ...], BaseConfig] = {}
        """By the numbers of those that vary."""

    def at(self, name: str, depth: int) -> BaseConfig:
        """Return the configuration at a tensor; one object for the same values.

        Raises:
            ConfigError: a value isn't valid there.
        """
        values = self.varying.items()
        return self._config([value_at(value, name, depth, what=self._named.get(o, o)) for o, value in values])

    def some(self) -> BaseConfig:
        """Return the configuration with one of the numbers of each option that varies."""
        return self._config([_some(value) for value in self.varying.values()])

    def _config(self, numbers: Sequence[float]) -> BaseConfig:
        key = tuple(numbers)
        if key not in self.configs:
            values = {**self._fixed, **dict(zip(self.varying, numbers, strict=True))}
            try:
                self.configs[key] = self._method.Config.parse(values, place=self._places)
            except ConfigError as error:
                problem = self._owner + error.problem
                raise ConfigError(problem, place=error.place, got=error.got, fix=error.fix) from None
        return self.configs[key]


def is_number(method: type[Merger], name: str) -> bool:
    """Tell whether an option of a method is a number, which may vary by layer; a list or a group then says how."""
    field = method.Config.model_fields.get(name)
    kinds = set() if field is None else {*alternatives(field.annotation)} - {NoneType}
    return bool(kinds) and kinds <= {float, int}


def _some(value: Value) -> float:
    """Return one of the numbers of a value that varies."""
    if isinstance(value, LayerValues):
        runs = [run.value for run in value.runs or ()]
        inner: Sequence[Any] = [value.layers, value.gradient, *runs, *value.filters.values(), value.default]
        return _some(next(one for one in inner if one is not None))
    return float(value[0]) if isinstance(value, list) else float(value)


def _paths(value: Any) -> Iterator[Path]:
    """Yield the paths in a value of any depth."""
    if isinstance(value, Path):
        yield value.expanduser()
    elif isinstance(value, BaseModel):
        yield from _paths([getattr(value, name) for name in type(value).model_fields])
    elif isinstance(value, Mapping):
        yield from _paths(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _paths(one)
