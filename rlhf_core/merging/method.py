"""The method of a merge with its options, which may vary by layer and by model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf_core import registry
from rlhf_core.errors import ConfigError, PluginError, did_you_mean, nearest
from rlhf_core.interfaces import Merger
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.plan import Plan
from rlhf_core.merging.streams import StreamMerger
from rlhf_core.merging.weights import GROUPS, LayerValues, Value, layer_wise_interpolation, unused_filters

log = logging.getLogger(__name__)

_VALUE: TypeAdapter[Value] = TypeAdapter(Value)


class Method:
    """The merger of a configuration, and the values that it takes at each tensor."""

    def __init__(self, config: MergeConfig, *, place: Mapping[str, str] | str = "config") -> None:
        self.config, self._place = config, place
        self.plugin = registry.lookup(config.method, "merger")
        self._class: type[Merger] = registry.load(self.plugin)
        self.evaluates = self._class.merge is not Merger.merge
        given = dict(config.options)
        if "seed" in self._class.Config.model_fields:
            given.setdefault("seed", config.seed)
        self._by_layer = {
            name: self._profile(name, value) for name, value in given.items() if self._varies(name, value)
        }
        self._fixed = {name: value for name, value in given.items() if name not in self._by_layer}
        for number, entry in enumerate(config.models):
            for name in entry.options:
                self._check_own(name, f"models[{number}].options")
        self.merger = self._instance({name: _some(value) for name, value in self._by_layer.items()})
        self._cache: dict[tuple[tuple[str, float], ...], Merger] = {}

    def for_tensor(self, merger: Merger, name: str, depth: int) -> Merger:
        """Return the merger with the values that its options have at a tensor; `merger` itself where none varies."""
        if not self._by_layer or merger is not self.merger:
            return merger
        return self._cached(self._at(name, depth))

    def _at(self, name: str, depth: int) -> dict[str, float]:
        """Return the options that vary by layer, at a tensor."""
        return {
            option: layer_wise_interpolation(value, name, depth, what=option)
            for option, value in self._by_layer.items()
        }

    def _cached(self, values: Mapping[str, float]) -> Merger:
        key = tuple(sorted(values.items()))
        if key not in self._cache:
            self._cache[key] = self._instance(values)
        return self._cache[key]

    def _values(self) -> Iterator[tuple[str, Value]]:
        """Yield every value that may vary by layer, with its name."""
        yield from self._by_layer.items()
        for number, entry in enumerate(self.config.models):
            yield f"models[{number}].weight", entry.weight
            for option, value in entry.options.items():
                yield f"models[{number}].{option}", value

    def values(self, name: str, depth: int) -> tuple[list[float], list[dict[str, float]]]:
        """Return each model's weight, and its own options, at a tensor."""
        weights, options = [], []
        for number, entry in enumerate(self.config.models):
            what = f"models[{number}]"
            weights.append(layer_wise_interpolation(entry.weight, name, depth, what=f"{what}.weight"))
            own = {
                option: layer_wise_interpolation(value, name, depth, what=f"{what}.options.{option}")
                for option, value in entry.options.items()
            }
            options.append(own)
        return weights, options

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
            weights, options = self.values(name, plan.depth)
            for own in options:
                if own:
                    self._cached({**self._at(name, plan.depth), **own})
            there = [weight for weight, model in zip(weights, plan.models, strict=True) if not model.absent(name)]
            self.for_tensor(self.merger, name, plan.depth).check_weights(there)

    def recipe(self) -> dict[str, Any]:
        """Return what the output's bytes depend on besides the inputs, as JSON values."""
        settings = self.config.model_dump(
            mode="json", include={"models", "options", "tokenizer", "pad_to_multiple_of", "dtype", "seed"}
        )
        for entry in settings["models"]:
            del entry["model"]
        return {"method": self.plugin.qualified, "version": self.plugin.version, **settings}

    def _instance(self, values: Mapping[str, Any]) -> Merger:
        return self._class(self._class.Config.parse({**self._fixed, **values}, place=self._place))

    def _varies(self, name: str, value: Any) -> bool:
        field = self._class.Config.model_fields.get(name)
        return field is not None and field.annotation in (float, int) and isinstance(value, list | dict | LayerValues)

    def _profile(self, name: str, value: Any) -> Value:
        where = self._place if isinstance(self._place, str) else self._place.get(name, "config")
        if value == []:
            raise ConfigError(f"`{name}` is an empty list", place=where, fix="give at least one value")
        try:
            return _VALUE.validate_python(value)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(
                f"`{name}` is neither a number nor values by layer: {message}",
                place=where,
                fix="give a number, a list over the layers, or `layers`, `gradient`, `filters`, `default`",
            ) from None

    def _check_own(self, name: str, place: str) -> None:
        if name in self._class.per_model:
            if not issubclass(self._class, StreamMerger):
                raise PluginError(
                    "names options by model, which only a StreamMerger is told",
                    place=f"merger `{self.plugin.qualified}`",
                    got=name,
                )
            return
        if name in self._class.Config.model_fields:
            own = ", ".join(self._class.per_model) or "none"
            raise ConfigError(
                f"`{name}` is the same for all models in {self.config.method}", place=place, fix=f"may differ: {own}"
            )
        raise ConfigError(
            f"unknown option `{name}` of {self.config.method}",
            place=place,
            fix=did_you_mean(name, self._class.per_model),
        )


def _some(value: Value) -> float:
    """Return one of the numbers of a value that varies."""
    if isinstance(value, LayerValues):
        runs = [run.value for run in value.runs or ()]
        inner: Sequence[Any] = [value.layers, value.gradient, *runs, *value.filters.values(), value.default]
        return _some(next(one for one in inner if one is not None))
    return float(value[0]) if isinstance(value, list) else float(value)
