"""The parameters of mergekit's files: numbers, gradients and lists of conditions, translated into numbers and per-layer values.

A gradient goes over the layers; a tensor outside them gets its first value. Of a list of `{filter, value}` the first entry whose
filter is part of the tensor's name counts, one without a filter matches all; where none matches, the next wider scope counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_core.infra.errors import ConfigError, shortened

REQUIRED: Any = object()
"""Stands for the default of a parameter that has none."""


class ParameterScope(NamedTuple):
    """Parameters that are set together: those of a source, a slice, a model, a module or the file."""

    key: str
    """Their dotted key, such as `models.0.parameters`."""
    values: Mapping[str, Any]
    of_model: bool = False
    """Whether they are of one model, not of all."""


def per_layer_value(name: str, scopes: Sequence[ParameterScope], default: Any, place: Callable[[str], str]) -> Any:
    """Return a parameter as a number, or as a mapping that `LayerValues` of `rlhf_core.merging` accepts.

    Args:
        name: the parameter's.
        scopes: where it may be set, the narrowest first.
        default: its value where nothing else fits; `REQUIRED` is returned where that is the default and some tensor needs it.
        place: returns the place of a dotted key, for messages.

    Raises:
        ConfigError: what is set is no value that mergekit has.
    """
    filters: dict[str, Any] = {}
    for part, given in list(_conditions(name, scopes, place)):  # all are checked, also those that never count
        if part is None:
            default = _as_gradient(given)
            break
        filters.setdefault(f"*{part}*", _as_gradient(given))
    if not filters or default is REQUIRED:
        return default
    return {"filters": filters, **(default if isinstance(default, Mapping) else {"default": default})}


def in_runs(values: Sequence[Any], counts: Sequence[int]) -> Any:
    """Return one per-layer value for consecutive runs of layers.

    Args:
        values: each run's per-layer value; a gradient goes over its run only.
        counts: layers per run.
    """
    if len(values) == 1 or (all(one == values[0] for one in values) and not _varies(values[0])):
        return values[0]
    last = [_for_one_layer(one) if count == 1 else one for one, count in zip(values, counts, strict=True)]
    return {"runs": [{"count": count, "value": one} for one, count in zip(last, counts, strict=True)]}


def mapped(value: Any, change: Callable[[float], float]) -> Any:
    """Return a per-layer value with each of its numbers changed."""
    if isinstance(value, Mapping):
        return {key: mapped(inner, change) for key, inner in value.items()}
    return [mapped(inner, change) for inner in value] if isinstance(value, list) else change(value)


def constant(given: Any) -> Any:
    """Return a boolean where a text or number of a file means true or false; anything else unchanged."""
    if isinstance(given, str):
        return {"true": True, "false": False}.get(given.lower(), given)
    return bool(given) if isinstance(given, int) and given in (0, 1) else given


def _conditions(
    name: str, scopes: Sequence[ParameterScope], place: Callable[[str], str]
) -> Iterator[tuple[str | None, Any]]:
    """Yield (part of a tensor's name or None for all, number or gradient) for a parameter, those that count first first."""
    for scope in scopes:
        if name not in scope.values:
            continue
        given, where = scope.values[name], place(f"{scope.key}.{name}")
        if not (isinstance(given, list) and any(isinstance(one, Mapping) for one in given)):
            given = [{"value": given}]
        for one in given:
            if not isinstance(one, Mapping) or set(one) - {"filter", "value"} or "value" not in one:
                raise ConfigError(
                    f"an entry of `{name}` needs a `value`, and may have a `filter`", place=where, got=shortened(one)
                )
            part = one.get("filter")
            if part is not None and (not isinstance(part, str) or not part or ("*" in part and part != "*")):
                problem = "a filter must be part of a tensor's name, or `*` alone"
                raise ConfigError(
                    problem,
                    place=where,
                    got=shortened(part),
                    fix="patterns aren't supported (nor does mergekit support them)",
                )
            yield None if part == "*" else part, _plain(one["value"], name, where)


def _plain(given: Any, name: str, place: str) -> Any:
    """Return a number, a boolean or a list of them; text is converted."""
    if isinstance(given, list) and given and not any(isinstance(one, list) for one in given):
        return [_plain(one, name, place) for one in given]
    if isinstance(given, bool | int | float):
        return given
    try:
        return float(given)
    except (TypeError, ValueError):
        if isinstance(value := constant(given), bool):
            return value
        raise ConfigError(f"invalid value of `{name}` for mergekit", place=place, got=shortened(given)) from None


def _as_gradient(given: Any) -> Any:
    """Return a list as a gradient, its first number as the default outside the layers; as one number where all are equal."""
    if not isinstance(given, list):
        return given
    return given[0] if len(set(given)) == 1 else {"gradient": given, "default": given[0]}


def _varies(value: Any) -> bool:
    """Tell whether a per-layer value differs between layers of one run."""
    if not isinstance(value, Mapping):
        return False
    return "gradient" in value or any(_varies(one) for one in value.get("filters", {}).values())


def _for_one_layer(value: Any) -> Any:
    """Return a per-layer value for a run of one layer, where mergekit uses the last number of a gradient."""
    if not isinstance(value, Mapping):
        return value
    changed: dict[str, Any] = {"gradient": value["gradient"][-1:]} if "gradient" in value else {}
    if "filters" in value:
        changed["filters"] = {part: _for_one_layer(one) for part, one in value["filters"].items()}
    return {**value, **changed}
