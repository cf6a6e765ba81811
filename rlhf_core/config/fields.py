"""The fields of a configuration: what types each takes, which of them are groups, and each as a row for people.

This is the one place that walks over annotations; flags, error places, listings and the conformance kit use it.
Importing this imports no torch.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a value of this annotation may have: a union's, flat and without what is annotated; else it alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for part in get_args(annotation) for kind in alternatives(part))
    return alternatives(get_args(annotation)[0]) if get_origin(annotation) is Annotated else (annotation,)


def is_group(kind: Any) -> bool:
    """Tell whether a type is a configuration class, whose fields are options in a group."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def group_of(annotation: Any, *, items: bool = True) -> type[BaseModel] | None:
    """Return the first configuration class among an annotation's alternatives; with `items`, that of a list's items too."""
    kinds = get_args(annotation) if items and get_origin(annotation) is list else alternatives(annotation)
    return next((kind for kind in kinds if is_group(kind)), None)


def key_and_group(config: type[BaseModel], location: Sequence[int | str]) -> tuple[str, type[BaseModel]]:
    """Return what the location in one of pydantic's errors means: the dotted key, and the innermost configuration class there.

    A location is a path of fields, list positions and keys of mappings. Where a value may be of several types, pydantic adds the
    name of one of them, which is no part of the key.
    """
    key: list[str] = []
    group, kinds, type_follows = config, (config,), False
    for part in location:
        if type_follows:
            type_follows = False
            continue
        key.append(str(part))
        kinds = tuple(
            kind for inside in _inside(kinds, part) for kind in alternatives(inside) if kind is not types.NoneType
        )
        type_follows = len(kinds) > 1
        group = next(filter(is_group, kinds), group)
    return ".".join(key), group


def _inside(kinds: Sequence[Any], part: int | str) -> list[Any]:
    """Return the annotation of a field, list item or value of a mapping, from the types that its container may have; or none."""
    for kind in kinds:
        if is_group(kind) and part in kind.model_fields:
            return [kind.model_fields[part].annotation]
        if get_origin(kind) is (list if isinstance(part, int) else dict):
            return [get_args(kind)[-1]]
    return []


def option_names(config: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every option that a flag can set, of groups too: `lora`, `lora.rank`, …"""
    for name, info in config.model_fields.items():
        yield prefix + name
        if (group := group_of(info.annotation, items=False)) is not None:
            yield from option_names(group, f"{prefix}{name}.")


def option_at(config: type[BaseModel], name: str) -> tuple[str, tuple[Any, ...]] | None:
    """Return the dotted key of an option, and the types that its value may have; None where there is no such option.

    Args:
        name: as in a flag, `lora.rank`, where `-` and `_` are alike; or an entry of a mapping, whose key stays as typed.
    """
    key: list[str] = []
    kinds: tuple[Any, ...] = (config,)
    parts = name.split(".")
    for part in parts:
        mappings = [kind for kind in kinds if get_origin(kind) is dict] if len(key) + 1 == len(parts) else []
        key.append(part if mappings else part.replace("-", "_"))
        inside = _inside(mappings or [kind for kind in kinds if is_group(kind)], key[-1])
        if not inside:
            return None
        kinds = alternatives(inside[0])
    return ".".join(key), kinds


def single_options(
    config: type[BaseModel], without: tuple[type[BaseModel], ...] = (), prefix: str = ""
) -> Iterator[str]:
    """Yield the dotted name of each option, of a group that is always there those in it; a group that may be off counts as one.

    Args:
        without: classes of groups that are left out.
    """
    for name, info in config.model_fields.items():
        groups = [kind for kind in alternatives(info.annotation) if is_group(kind)]
        if any(issubclass(group, without) for group in groups):
            continue
        if groups == [info.annotation]:
            yield from single_options(groups[0], without, f"{prefix}{name}.")
        else:
            yield prefix + name


class OptionRow(NamedTuple):
    """One option, or a group of them."""

    name: str
    kind: str
    default: str
    meaning: str
    group: type[BaseModel] | None
    """The group's class, where the option is one."""


def option_rows(config: type[BaseModel], prefix: str = "") -> Iterator[OptionRow]:
    """Yield the options of a configuration, a group as one row."""
    for name, info in config.model_fields.items():
        default = default_of(info)
        group = group_of(info.annotation)
        shown_default = "required" if info.is_required() else shown(default)
        if isinstance(default, BaseModel):
            shown_default = ""
        kind = type_name(info.annotation)
        if group_of(info.annotation, items=False) is not None:
            kind = kind.removesuffix(" or null")
        yield OptionRow(prefix + name, kind, shown_default, info.description or "", group)


def every_option(config: type[BaseModel], prefix: str = "") -> Iterator[OptionRow]:
    """Yield the options of a configuration and of its groups, by their dotted names."""
    for row in option_rows(config, prefix):
        yield row
        if row.group is not None:
            yield from every_option(row.group, f"{row.name}.")


def default_of(info: Any) -> Any:
    """Return a field's default; None where it has none."""
    value = info.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else value


def type_name(annotation: Any) -> str:
    """Return a type in words; the values of a choice one by one."""
    if len(kinds := alternatives(annotation)) > 1:
        return " or ".join("null" if kind is types.NoneType else type_name(kind) for kind in kinds)
    annotation = kinds[0]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (list, dict, tuple):
        return f"{origin.__name__} of {' → '.join(type_name(part) for part in args)}"
    if is_group(annotation):
        return "group"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    return {Any: "any value", str: "text", int: "whole number", float: "number", bool: "true or false"}.get(
        annotation, str(annotation)
    )


def shown(value: Any) -> str:
    """Return a value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and (value == "" or not value.isprintable()):
        return repr(value).replace("'", '"')
    return str(value)
