"""The method of a merge: its class, built once from the configuration, and the values of options that vary by layer or model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import ConfigError, PluginError, nearest
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.inputs import MergeInput, check_own
from rlhf_core.merging.one_tensor import options_of
from rlhf_core.merging.plan import Plan
from rlhf_core.merging.weights import GROUPS, LayerValues, Value, unused_filters, value_at

log = logging.getLogger(__name__)

_VALUE: TypeAdapter[Value] = TypeAdapter(Value)

Numbers = Mapping[str, float]
"""The values at one tensor of the options that vary by layer."""


class MergeMethod:
    """The merger that a configuration names, and the weights and options of each model at each tensor.

    Args:
        config: the merge.
        place: where its keys were set, for messages.

    Raises:
        ConfigError: an option is unknown or invalid.
        PluginError: the merger is broken.
    """

    def __init__(self, config: MergeConfig, *, place: Mapping[str, str] | str = "config") -> None:
        self.config, self._place = config, place
        self.plugin = registry.lookup(config.method, "merger")
        self._class: type[Merger] = registry.load(self.plugin)
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
        self._shared = _Options(
            self._class, given, lambda key: place if isinstance(place, str) else place.get(key, "config")
        )
        self._own = []
        for number, entry in enumerate(config.models):
            at = self._places_of_model(number)
            for name in entry.options:
                check_own(name, self._class, config.method, at[name])
            self._own.append(_Options(self._class, entry.options, at.__getitem__))
        self._mergers: dict[tuple[tuple[str, float], ...], Merger] = {}
        self._options: dict[tuple[int, tuple[tuple[str, float], ...]], Mapping[str, Any]] = {}
        self.merger = self._merger(self._shared.some())
        for number, own in enumerate(self._own):
            self._options_with(number, self._shared.some(), own.some())

    def merger_at(self, merger: Merger, name: str, depth: int) -> Merger:
        """Return the merger with the values that its options have at a tensor; `merger` itself where none varies."""
        if not self._shared.varying or merger is not self.merger:
            return merger
        return self._merger(self._shared.at(name, depth))

    def inputs_at(self, merger: Merger, plan: Plan, name: str) -> list[MergeInput]:
        """Return the plan's models with their weights and options at a tensor.

        Args:
            merger: `self.merger`, or another one that a method which overrides `merge` made, whose options then count.
            plan: the merge's.
            name: of the tensor.
        """
        found = []
        for number, (model, entry, own) in enumerate(zip(plan.models, self.config.models, self._own, strict=True)):
            weight = value_at(entry.weight, name, plan.depth, what=f"models[{number}].weight")
            values = own.at(name, plan.depth, what=f"models[{number}].")
            if merger is self.merger:
                options = self._options_with(number, self._shared.at(name, plan.depth), values)
            else:
                options = options_of(merger, {**own.fixed, **values})
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
                    log.warning("a filter of `%s` fits no tensor: `%s`", what, part)
                    continue
                raise ConfigError(
                    f"a filter of `{what}` fits no tensor", place=what, got=f"`{part}`", fix=f"did you mean `{near}`?"
                )
        self.check_weights(plan, self.merger, range(len(plan.models)))

    def check_weights(self, plan: Plan, merger: Merger, chosen: Sequence[int]) -> None:
        """Raise where a method can't have the weights that some models have at a tensor, or has an invalid option there."""
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
        config: list[Any] = [self.merger.config, *self._options.values()]
        return sorted({path for path in _paths(config) if path.exists()})

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
        yield from self._shared.varying.items()
        for number, entry in enumerate(self.config.models):
            yield f"models[{number}].weight", entry.weight
            for option, value in self._own[number].varying.items():
                yield f"models[{number}].{option}", value

    def _places_of_model(self, number: int) -> dict[str, str]:
        """Return where each of a model's own options was set; under an empty name, where the model was."""
        places = {} if isinstance(self._place, str) else self._place
        at, key = f"models[{number}]", f"models.{number}"
        own = self.config.models[number].options
        return {"": places.get(key, at)} | {n: places.get(f"{key}.options.{n}", f"{at}.{n}") for n in own}

    def _merger(self, values: Numbers) -> Merger:
        key = tuple(sorted(values.items()))
        if key not in self._mergers:
            config = self._class.Config.parse({**self._shared.fixed, **values}, place=self._place)
            self._mergers[key] = self._class(config)
        return self._mergers[key]

    def _options_with(self, number: int, shared: Numbers, own: Numbers) -> Mapping[str, Any]:
        """Return a model's options, validated as the method's are, with these values of those that vary by layer."""
        entry = self.config.models[number]
        values = {**{name: value for name, value in shared.items() if name not in entry.options}, **own}
        key = number, tuple(sorted(values.items()))
        if key not in self._options:
            given = {**self._shared.fixed, **self._own[number].fixed, **values}
            try:
                config: BaseConfig = self._class.Config.parse(given, place=self._places_of_model(number))
            except ConfigError as error:
                name = entry.model if isinstance(entry.model, str) else f"models[{number}]"
                raise ConfigError(
                    f"model {name}: {error.problem}", place=error.place, got=error.got, fix=error.fix
                ) from None
            self._options[key] = MappingProxyType({name: getattr(config, name) for name in self._class.per_model})
        return self._options[key]


class _Options:
    """Options as they were given: the numbers that vary by layer, and the rest.

    Args:
        method: the merger's class.
        given: the options by name.
        place: returns where an option was set.
    """

    def __init__(self, method: type[Merger], given: Mapping[str, Any], place: Callable[[str], str]) -> None:
        self.varying = {
            name: _by_layer(name, value, place(name))
            for name, value in given.items()
            if isinstance(value, list | Mapping | LayerValues) and is_number(method, name)
        }
        self.fixed = {name: value for name, value in given.items() if name not in self.varying}

    def at(self, name: str, depth: int, what: str = "") -> dict[str, float]:
        """Return those that vary, at a tensor."""
        return {option: value_at(value, name, depth, what=f"{what}{option}") for option, value in self.varying.items()}

    def some(self) -> dict[str, float]:
        """Return one of the numbers of each that varies."""
        return {name: _some(value) for name, value in self.varying.items()}


def is_number(method: type[Merger], name: str) -> bool:
    """Tell whether an option of a method is a number, which may vary by layer; a list or a group then says how."""
    field = method.Config.model_fields.get(name)
    kinds = set() if field is None else {*(get_args(field.annotation) or (field.annotation,))} - {NoneType}
    return bool(kinds) and kinds <= {float, int}


def _by_layer(name: str, value: Any, place: str) -> Value:
    if value == []:
        raise ConfigError(f"`{name}` is an empty list", place=place, fix="give at least one value")
    try:
        return _VALUE.validate_python(value)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(
            f"`{name}` is neither a number nor values by layer: {message}",
            place=place,
            fix="give a number, a list over the layers, or `layers`, `gradient`, `filters`, `default`",
        ) from None


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
