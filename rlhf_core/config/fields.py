"""A configuration's options as rows for people: name, type, default, meaning. Importing this imports no torch."""

from __future__ import annotations

import types
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


class OptionRow(NamedTuple):
    """One option, or a group of them."""

    name: str
    kind: str
    default: str
    meaning: str
    group: type[BaseModel] | None
    """The group's class, where the option is one."""


def option_rows(config: type[BaseModel], prefix: str = "") -> Iterator[OptionRow]:
    """Yield the options of a configuration; groups stand for themselves."""
    for name, info in config.model_fields.items():
        default = default_of(info)
        group = group_of(info.annotation)
        shown_default = "required" if info.is_required() else shown(default)
        if isinstance(default, BaseModel):
            shown_default = ""
        kind = type_name(info.annotation)
        if group is not None:
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


def group_of(annotation: Any) -> type[BaseModel] | None:
    """Return the configuration class in an annotation, if one is there."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def type_name(annotation: Any) -> str:
    """Return a type in words; the values of a choice one by one."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_name(part) for part in args)
    if origin in (list, dict, tuple):
        return f"{origin.__name__} of {' → '.join(type_name(part) for part in args)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
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
