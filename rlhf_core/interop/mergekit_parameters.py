"""A parameter of one of mergekit's files as a value by place: numbers, gradients and lists of conditions.

A gradient runs over the layers; a tensor outside of them takes its first value. Of a list of `{filter, value}` the first whose
filter is part of the tensor's name counts, and one without a filter fits all; where none fits, the next wider setting does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_core.infra.errors import ConfigError, shortened

Condition = tuple[str | None, Any]
"""A part of a name, or None for all, with a scalar or a gradient."""


class Setting(NamedTuple):
    """Parameters as they are set in one place of the file."""

    model: str
    """The model that they are for; empty where for all."""
    values: Mapping[str, Any]
    key: str
    """The dotted key under which they stand."""


def conditions(name: str, settings: Sequence[Setting], place: Callable[[str], str]) -> list[Condition]:
    """Return all that settings say of a parameter, what counts first first."""
    found: list[Condition] = []
    for setting in settings:
        if name not in setting.values:
            continue
        given, key = setting.values[name], f"{setting.key}.{name}"
        if isinstance(given, list) and any(isinstance(one, Mapping) for one in given):
            for one in given:
                if not isinstance(one, Mapping) or set(one) - {"filter", "value"} or "value" not in one:
                    raise ConfigError(f"`{name}` has no `filter` and `value`", place=place(key), got=shortened(one))
                found.append((_part(one.get("filter"), place(key)), _plain(one["value"], name, place(key))))
        else:
            found.append((None, _plain(given, name, place(key))))
    return found


def value(found: Sequence[Condition], missing: Callable[[], ConfigError]) -> Any:
    """Return conditions as `rlhf_core.merging.weights.LayerValues` says them, or as a plain value."""
    filters: dict[str, Any] = {}
    for part, given in found:
        if part is not None:
            filters.setdefault(f"*{part}*", _by_layer(given))
            continue
        fallback = _by_layer(given)
        if not filters:
            return fallback
        return {"filters": filters, **(fallback if isinstance(fallback, Mapping) else {"default": fallback})}
    raise missing()


def in_runs(values: Sequence[Any], counts: Sequence[int]) -> Any:
    """Return the values of runs of layers, of so many each, as one value by place."""
    if len(values) == 1 or (all(one == values[0] for one in values) and not _varies(values[0])):
        return values[0]
    runs = [
        {"count": count, "value": _alone(one) if count == 1 else one} for one, count in zip(values, counts, strict=True)
    ]
    return {"runs": runs}


def _varies(given: Any) -> bool:
    """Tell whether a value is another at another layer of a run."""
    if isinstance(given, Mapping):
        return "gradient" in given or any(_varies(one) for one in given.get("filters", {}).values())
    return isinstance(given, list)


def _alone(given: Any) -> Any:
    """Return what a gradient over a single layer is there: its last value."""
    if not isinstance(given, Mapping):
        return given
    changed = {"gradient": given["gradient"][-1:]} if "gradient" in given else {}
    filters = {part: _alone(one) for part, one in given.get("filters", {}).items()}
    return {**given, **changed, **({"filters": filters} if filters else {})}


def mapped(given: Any, change: Callable[[float], float]) -> Any:
    """Return a value with each of its numbers changed."""
    if isinstance(given, Mapping):
        return {key: mapped(inner, change) for key, inner in given.items()}
    return [mapped(inner, change) for inner in given] if isinstance(given, list) else change(given)


def constant(given: Any) -> Any:
    """Return a value that doesn't vary, texts of flags and numbers as what they mean; else as it is."""
    if isinstance(given, str):
        return {"true": True, "false": False}.get(given.lower(), given)
    return bool(given) if isinstance(given, int) and given in (0, 1) else given


def _by_layer(given: Any) -> Any:
    if not isinstance(given, list):
        return given
    return given[0] if len(set(given)) == 1 else {"gradient": given, "default": given[0]}


def _plain(given: Any, name: str, place: str) -> Any:
    """Return a scalar or a list of them, numbers written as text turned into numbers."""
    if isinstance(given, list) and given:
        return [_plain(one, name, place) for one in given]
    if isinstance(given, bool | int | float):
        return given
    try:
        return float(given)
    except (TypeError, ValueError):
        if isinstance(given, str) and given.lower() in ("true", "false"):
            return given.lower() == "true"
        raise ConfigError(f"`{name}` is no value that mergekit has", place=place, got=shortened(given)) from None


def _part(given: Any, place: str) -> str | None:
    if given in (None, "*"):
        return None
    if not isinstance(given, str) or not given or "*" in given:
        raise ConfigError(
            "a filter is part of a tensor's name, or `*` alone", place=place, got=shortened(given), fix="no patterns"
        )
    return given
