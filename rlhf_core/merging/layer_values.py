"""Values that vary by layer or by tensor: one number, a list over the layers, or values by parts of tensors' names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

import numpy
from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.merging.tensor_names import GROUPS, in_group, layer_of


def _not_empty(values: list[Any]) -> list[Any]:
    """Return a list over the layers; raise where it is empty."""
    if not values:
        raise ValueError("a list over the layers needs at least one value")
    return values


_Numbers = Annotated[list[float], AfterValidator(_not_empty)]


class RunValue(BaseConfig):
    """A value for a run of layers."""

    count: int = Field(ge=1, description="Number of layers in the run.")
    value: Value = Field(
        description="A number, a gradient from the run's first layer to its last, or per-layer values."
    )


class LayerValues(BaseConfig):
    """A number per layer, or per part of tensors' names."""

    layers: _Numbers | None = Field(None, description="One value per layer; their number must be the model's.")
    gradient: _Numbers | None = Field(
        None,
        description="Values at even distances from the first layer to the last, with straight lines between.",
    )
    filters: dict[str, Value] = Field(
        default_factory=dict,
        description="Part of a tensor's name (or attention, mlp, embeddings, head, norms; or a pattern with `*` for the whole"
        " name) → a number, a gradient, or per-layer values in turn. The first that matches counts.",
    )
    runs: Annotated[list[RunValue], AfterValidator(_not_empty)] | None = Field(
        None,
        description="Values of consecutive runs of layers, as `{count, value}`: a gradient goes over its own run. Tensors before"
        " the layers take the first run's value, those after them the last's.",
    )
    default: float | None = Field(
        None,
        description="Value of tensors that nothing else matches; null takes the first layer's before it, the last's after.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> LayerValues:
        """Raise where the values are given in several ways, or in none."""
        if sum(one is not None for one in (self.layers, self.gradient, self.runs)) > 1:
            raise ValueError("`layers`, `gradient` and `runs` say the same in several ways: give one of them")
        if not any((self.layers, self.gradient, self.runs, self.filters)) and self.default is None:
            raise ValueError("give `layers`, `gradient`, `runs`, `filters` or `default`")
        return self


def _shape(value: Any) -> str:
    """Return which shape a per-layer value has, by which errors in it are those of that shape alone."""
    if isinstance(value, Mapping | LayerValues):
        return "group"
    return "list" if isinstance(value, list | tuple) else "number"


Value = Annotated[
    Annotated[float, Tag("number")] | Annotated[_Numbers, Tag("list")] | Annotated[LayerValues, Tag("group")],
    Discriminator(_shape),
]
"""One number, a list of numbers as a gradient over the layers, or a group of per-layer values."""
RunValue.model_rebuild()
LayerValues.model_rebuild()


def value_at(value: Value, name: str, depth: int, *, what: str = "weight") -> float:
    """Return a value for one tensor of a model with `depth` layers.

    A list is a gradient: its values stand at even distances from the first layer to the last, and layers between two of them
    lie on the straight line; a list of `depth` values gives each layer its own. Tensors outside the layers take the value
    of the first layer (embeddings) or the last (the final norm, the head), or `default` where one is set.

    Raises:
        ConfigError: `layers` has another length than the model, or nothing fits the tensor. `what` names the option in it.
    """
    return _at(value, name, layer_of(name), depth, what)


def _at(value: Value, name: str, layer: int | None, depth: int, what: str) -> float:
    """Return a value at a layer; None is a tensor outside the layers."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list):
        return _along(value, name, layer, depth, what)
    for part, inner in value.filters.items():
        if _fits(part, name):
            return _at(inner, name, layer, depth, what)
    if layer is None and value.default is not None:
        return value.default
    if value.layers is not None:
        if len(value.layers) != depth:
            raise ConfigError(
                f"`{what}.layers` has {len(value.layers)} values, the model {depth} layers",
                place=what,
                fix=f"give {depth} values, or use `gradient`",
            )
        return _along(value.layers, name, layer, depth, what)
    if value.gradient is not None:
        return _along(value.gradient, name, layer, depth, what)
    if value.runs is not None:
        return _in_runs(value.runs, name, layer, depth, what)
    if value.default is None:
        raise ConfigError(
            f"no filter of `{what}` fits tensor `{name}`",
            place=what,
            fix="add a `default`, for tensors that no filter fits",
        )
    return value.default


def _in_runs(runs: Sequence[RunValue], name: str, layer: int | None, depth: int, what: str) -> float:
    if (total := sum(run.count for run in runs)) != depth:
        raise ConfigError(
            f"the runs of `{what}` have {total} layers, the model {depth}",
            place=what,
            fix=f"let them add up to {depth}",
        )
    if layer is None:
        run = runs[0] if in_group(name, "embeddings") else runs[-1]
        return _at(run.value, name, None, run.count, what)
    for run in runs:
        if layer < run.count:
            return _at(run.value, name, layer, run.count, what)
        layer -= run.count
    raise AssertionError(name)


def unused_filters(value: Value, names: Sequence[str]) -> list[str]:
    """Return the filters of a value that fit none of the tensors."""
    if not isinstance(value, LayerValues):
        return []
    below = [*value.filters.values(), *(run.value for run in value.runs or ())]
    inner = [part for one in below for part in unused_filters(one, names)]
    return [part for part in value.filters if not any(_fits(part, name) for name in names)] + inner


def _along(values: Sequence[float], name: str, layer: int | None, depth: int, what: str) -> float:
    if layer is None:
        layer = 0 if in_group(name, "embeddings") else max(0, depth - 1)
    if depth <= 1:
        return float(values[0])
    return float(numpy.interp(layer / (depth - 1), numpy.linspace(0, 1, len(values)), values))


def _fits(part: str, name: str) -> bool:
    """Tell whether a filter fits a tensor: a pattern for its whole name, a group, or a part of its name."""
    if "*" in part:
        return fnmatchcase(name, part)
    if part in GROUPS:
        return in_group(name, part)
    # `layers.1` is no part of `layers.10`.
    left, right = (r"(?<!\d)" if part[:1].isdigit() else ""), (r"(?!\d)" if part[-1:].isdigit() else "")
    return re.search(left + re.escape(part) + right, name) is not None
