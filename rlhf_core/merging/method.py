"""The method of a merge with its options, which may vary by layer and by model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from rlhf_core import registry
from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import ConfigError, PluginError, nearest
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.inputs import check_own
from rlhf_core.merging.plan import Plan
from rlhf_core.merging.tensor import options_of
from rlhf_core.merging.weights import GROUPS, LayerValues, Value, unused_filters, value_at

log = logging.getLogger(__name__)

_VALUE: TypeAdapter[Value] = TypeAdapter(Value)

Options = Mapping[str, Any]


class Method:
    """The merger of a configuration, and the values that it and its models take at each tensor."""

    def __init__(self, config: MergeConfig, *, place: Mapping[str, str] | str = "config") -> None:
        self.config, self._place = config, place
        self.plugin = registry.lookup(config.method, "merger")
        self._class: type[Merger] = registry.load(self.plugin)
        self._check_class()
        self.evaluates = self._class.merge is not Merger.merge
        given = dict(config.options)
        if "seed" in self._class.Config.model_fields:
            given.setdefault("seed", config.seed)
        self._given = _Given(self._class, given, self._at_key)
        self._own = [self._own_of(number) for number in range(len(config.models))]
        self._mergers: dict[tuple[tuple[str, float], ...], Merger] = {}
        self._options: dict[tuple[int, tuple[tuple[str, float], ...]], Options] = {}
        self.merger = self._instance(self._given.some())
        for number, own in enumerate(self._own):
            self._options_with(number, self._given.some(), own.some())

    def for_tensor(self, merger: Merger, name: str, depth: int) -> Merger:
        """Return the merger with the values that its options have at a tensor; `merger` itself where none varies."""
        if not self._given.by_layer or merger is not self.merger:
            return merger
        values = self._given.at(name, depth)
        key = tuple(sorted(values.items()))
        if key not in self._mergers:
            self._mergers[key] = self._instance(values)
        return self._mergers[key]

    def weights(self, name: str, depth: int) -> list[float]:
        """Return each model's weight at a tensor."""
        return [
            value_at(entry.weight, name, depth, what=f"models[{number}].weight")
            for number, entry in enumerate(self.config.models)
        ]

    def options(self, merger: Merger, name: str, depth: int) -> list[Options]:
        """Return for each model what holds for it of the options that a model may have of its own, at a tensor."""
        found = []
        for number, own in enumerate(self._own):
            values = own.at(name, depth, what=f"models[{number}].")
            if merger is self.merger:
                found.append(self._options_with(number, self._given.at(name, depth), values))
            else:  # one that a method which overrides `merge` made
                found.append(options_of(merger, {**own.fixed, **values}))
        return found

    def check(self, plan: Plan) -> None:
        """Work out every value once, so that a wrong one is found before anything is read."""
        names = [item.name for item in plan.items if item.merged]
        for what, value in self._values():
            for part in unused_filters(value, names):
                near = nearest(part, {piece for name in names for piece in name.split(".")[:-1]} | set(GROUPS))
                if (
                    part in GROUPS or near is None
                ):  # a file for many models may speak of parts that this one doesn't have
                    log.warning("a filter of `%s` fits no tensor: `%s`", what, part)
                    continue
                raise ConfigError(
                    f"a filter of `{what}` fits no tensor", place=what, got=f"`{part}`", fix=f"did you mean `{near}`?"
                )
        for name in names:
            self.options(self.merger, name, plan.depth)
            weights = self.weights(name, plan.depth)
            there = [weight for weight, model in zip(weights, plan.models, strict=True) if not model.absent(name)]
            self.for_tensor(self.merger, name, plan.depth).check_weights(there)

    def require_one_value(self) -> None:
        """Raise where a model's weight or one of its options varies by layer."""
        for what, value in self._values():
            if what.startswith("models[") and not isinstance(value, int | float):
                raise ConfigError(
                    f"`{self.config.method}` takes one value for a whole model", place=what, fix="give one number"
                )

    @property
    def files(self) -> list[Path]:
        """The files and directories that options name, those that are there."""
        config: list[Any] = [self.merger.config, *self._options.values()]
        return sorted({path for path in _paths(config) if path.exists()})

    def recipe(self, merger: Merger) -> dict[str, Any]:
        """Return what the output's bytes depend on besides the inputs, as JSON values."""
        settings = self.config.model_dump(
            mode="json", include={"models", "options", "tokenizer", "pad_to_multiple_of", "dtype", "seed"}
        )
        for entry in settings["models"]:
            del entry["model"]
        stats = [(str(path), path.stat()) for path in self.files]
        return {
            "method": self.plugin.qualified,
            "version": self.plugin.version,
            **settings,
            "config": merger.config.model_dump(mode="json"),
            "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        }

    def _check_class(self) -> None:
        unknown = [name for name in self._class.per_model if name not in self._class.Config.model_fields]
        problem = None
        if unknown:
            problem = f"`per_model` names `{unknown[0]}`, which its configuration doesn't have"
        elif self._class.by_row and self._class.whole_tensors:
            problem = "declares `by_row` and `whole_tensors`: a chunk is either rows or a tensor"
        if problem:
            raise PluginError(problem, place=f"merger `{self.plugin.qualified}`", fix="mend the plugin")

    def _values(self) -> Iterator[tuple[str, Value]]:
        """Yield every value that may vary by layer, with its name."""
        yield from self._given.by_layer.items()
        for number, entry in enumerate(self.config.models):
            yield f"models[{number}].weight", entry.weight
            for option, value in self._own[number].by_layer.items():
                yield f"models[{number}].{option}", value

    def _own_of(self, number: int) -> _Given:
        entry = self.config.models[number]
        for name in entry.options:
            check_own(name, self._class, self.config.method, self._at_own(number, name))
        return _Given(self._class, entry.options, lambda name: self._at_own(number, name))

    def _at_key(self, name: str) -> str:
        return self._place if isinstance(self._place, str) else self._place.get(name, "config")

    def _at_own(self, number: int, name: str = "") -> str:
        """Return where one of a model's own options was set, or the model."""
        places = {} if isinstance(self._place, str) else self._place
        if not name:
            return places.get(f"models.{number}", f"models[{number}]")
        return places.get(f"models.{number}.options.{name}", f"models[{number}].{name}")

    def _instance(self, values: Options) -> Merger:
        return self._class(self._class.Config.parse({**self._given.fixed, **values}, place=self._place))

    def _options_with(self, number: int, shared: Mapping[str, float], own: Mapping[str, float]) -> Options:
        """Return a model's options, with these values of those that vary by layer; each is checked as the method's own are."""
        entry = self.config.models[number]
        values = {**{name: value for name, value in shared.items() if name not in entry.options}, **own}
        key = number, tuple(sorted(values.items()))
        if key not in self._options:
            places = {name: self._at_own(number, name) for name in entry.options} | {"": self._at_own(number)}
            try:
                config = self._class.Config.parse(
                    {**self._given.fixed, **self._own[number].fixed, **values}, place=places
                )
            except ConfigError as error:
                name = entry.model if isinstance(entry.model, str) else f"models[{number}]"
                raise ConfigError(
                    f"model {name}: {error.problem}", place=error.place, got=error.got, fix=error.fix
                ) from None
            self._options[key] = MappingProxyType({name: getattr(config, name) for name in self._class.per_model})
        return self._options[key]


class _Given:
    """Options as they were given: numbers that vary by layer, and the rest."""

    def __init__(self, method: type[Merger], given: Options, place: Any) -> None:
        self.by_layer = {
            name: _by_layer(name, value, place(name))
            for name, value in given.items()
            if isinstance(value, list | Mapping | LayerValues) and is_number(method, name)
        }
        self.fixed = {name: value for name, value in given.items() if name not in self.by_layer}

    def at(self, name: str, depth: int, what: str = "") -> dict[str, float]:
        """Return those that vary, at a tensor."""
        return {option: value_at(value, name, depth, what=f"{what}{option}") for option, value in self.by_layer.items()}

    def some(self) -> dict[str, float]:
        """Return one of the numbers of each that varies."""
        return {name: _some(value) for name, value in self.by_layer.items()}


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
