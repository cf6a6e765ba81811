"""What is wrong with a configuration, in plain words and with the place that it stands at. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rlhf_core.errors import ConfigError, did_you_mean, shortened

_PLAIN = {
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
}
"""What pydantic's commonest complaints mean."""


def config_error(
    cls: type[BaseModel], error: ValidationError, place: Mapping[str, str] | str, *, within: str = ""
) -> ConfigError:
    """Return the first of pydantic's complaints about a configuration as one of ours.

    `place` is where the values came from: one text, or a text for each dotted key. `within` is the key of what holds it.
    """
    first = error.errors(include_url=False)[0]
    key = ".".join(part for part in (within, _key(cls, first["loc"])) if part)
    where = place if isinstance(place, str) else place_of(key, place)
    # Of a check over several options, all of them would be shown.
    got = None if first["type"] == "value_error" and isinstance(first["input"], Mapping) else shortened(first["input"])
    if first["type"] == "extra_forbidden":
        owner = _group(cls, first["loc"][:-1])
        near = did_you_mean(str(first["loc"][-1]), owner.model_fields)
        return ConfigError(f"unknown option `{key}`", place=where, fix=near)
    if first["type"] == "missing":
        return ConfigError(f"`{key}` is missing", place=where, fix=f"set `{key}`")
    message = _PLAIN.get(
        first["type"], first["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    )
    if first["type"] in ("model_type", "model_attributes_type"):
        message = f"expected a group of options ({', '.join(_group(cls, first['loc']).model_fields)})"
    named = where.lstrip("-").replace("-", "_") == key  # by its flag
    problem = f"`{key}`: {message}" if key and not named else message
    fix = None
    if isinstance(first["input"], bool):
        mend = "write a number" if first["type"] == "flag_for_number" else "put the text in quotes if you meant text"
        fix = f"YAML reads yes, no, on and off as true and false: {mend}"
    return ConfigError(problem, place=where, got=got, fix=fix)


def place_of(key: str, places: Mapping[str, str]) -> str:
    """Return where a dotted key was set, else the nearest group around it, else the whole."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "config")


def _key(cls: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """Return the dotted key of a place in a configuration, without the type names that pydantic adds for unions."""
    parts: list[str] = []
    tag_follows = False
    for position, part in enumerate(path):
        if tag_follows:
            tag_follows = False
            continue
        parts.append(str(part))
        field = _group(cls, path[:position]).model_fields.get(str(part))
        kinds = get_args(field.annotation) if field and get_origin(field.annotation) in (Union, UnionType) else ()
        tag_follows = len([kind for kind in kinds if kind is not NoneType]) > 1
    return ".".join(parts)


def _group(cls: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the configuration class that stands at a dotted path."""
    for part in path:
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else None
        found = next(
            (
                t
                for t in (annotation, *getattr(annotation, "__args__", ()))
                if isinstance(t, type) and issubclass(t, BaseModel)
            ),
            None,
        )
        if found is None:
            return cls
        cls = found
    return cls
