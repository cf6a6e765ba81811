"""JSON schemas of configuration files, for editors and programs: what a file may hold, not only what a class is made of.

A file may write some things shorter than a class has them: one item for a list, a text for a group (`teacher: PATH`),
`lora: true`, and an environment variable where a number stands. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from rlhf_core.config.fields import alternatives, is_group

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_VARIABLE = {"$ref": "#/$defs/EnvironmentVariable"}
_ABOUT_VARIABLE = {
    "type": "string",
    "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^{}]*)?\}",
    "description": "An environment variable: `${NAME}`, or `${NAME:-default}`.",
}


def file_schema(
    parts: Sequence[type[BaseModel]], *, title: str, methods: Sequence[str] = (), required: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the JSON schema of a flat file that holds the options of several configurations.

    Args:
        parts: the configurations; of an option that several have, the first counts.
        methods: the names that the key `method` may have; none for a file without that key.
        required: keys that every such file has. Others that a configuration requires may be given by flags.
    """
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {"EnvironmentVariable": _ABOUT_VARIABLE}
    for part in parts:
        schema = part.model_json_schema()
        own = schema.get("$defs", {})
        _loosen(part, schema)
        for group in _groups(part):
            if group.__name__ in own:
                _loosen(group, own[group.__name__])
                own[group.__name__] = _or_alone(group, own[group.__name__])
        definitions |= own
        for name, about in schema.get("properties", {}).items():
            # pydantic leaves out a description that is the group's own.
            properties.setdefault(name, {"description": part.model_fields[name].description, **about})
    if methods:
        properties["method"] = {**properties.get("method", {}), "enum": [*methods]}
        properties["method"].pop("minLength", None)
    return {
        "$schema": DIALECT,
        "title": title,
        "type": "object",
        "properties": {name: _or_variable(about) for name, about in properties.items()},
        "required": [*required],
        "additionalProperties": False,
        "$defs": {name: _or_variable(about) for name, about in definitions.items()},
    }


def _groups(config: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield the configuration classes of a configuration's groups, those in lists and mappings too, each once."""
    seen: set[type[BaseModel]] = {config}
    waiting = [config]
    while waiting:
        for info in waiting.pop().model_fields.values():
            for kind in _kinds(info.annotation):
                if is_group(kind) and kind not in seen:
                    seen.add(kind)
                    waiting.append(kind)
                    yield kind


def _kinds(annotation: Any) -> Iterator[Any]:
    for kind in alternatives(annotation):
        yield kind
        for inside in get_args(kind):
            if inside is not annotation and not isinstance(inside, str | int | float):
                yield from _kinds(inside)


def _loosen(config: type[BaseModel], schema: dict[str, Any]) -> None:
    """Let properties be as short as a file may write them, in place."""
    properties = schema.get("properties", {})
    for name in getattr(config, "switched", ()):
        if name in properties:
            properties[name] = _any_of(properties[name], {"type": "boolean"})
    for decorator in config.__pydantic_decorators__.field_validators.values():
        if decorator.info.mode != "before" or "*" in decorator.info.fields:
            continue
        for name in decorator.info.fields:
            # Such a validator takes one item for a list; of anything else it can't be told what it takes.
            if (about := properties.get(name)) is not None:
                items = [one["items"] for one in (about, *about.get("anyOf", ())) if "items" in one]
                loose = {key: about[key] for key in ("title", "description", "default") if key in about}
                properties[name] = _any_of(about, *_flat(items)) if items else loose


def _flat(alternatives_: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [one for about in alternatives_ for one in about.get("anyOf", [about])]


def _any_of(about: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Return a property that may also be one of the others."""
    told = {key: about[key] for key in ("title", "description", "default") if key in about}
    own = {key: value for key, value in about.items() if key not in told}
    allowed = [*own.get("anyOf", [own])]
    allowed += [one for one in others if one not in allowed]
    return {"anyOf": allowed, **told}


def _or_alone(group: type[BaseModel], schema: dict[str, Any]) -> dict[str, Any]:
    """Return a group's schema, which may be a text where one option can be given alone."""
    return _any_of(schema, {"type": "string"}) if getattr(group, "alone", None) is not None else schema


def _or_variable(node: Any) -> Any:
    """Return a schema in which a number, a truth value and a choice may also be an environment variable."""
    if isinstance(node, list):
        return [_or_variable(one) for one in node]
    if not isinstance(node, Mapping) or node is _ABOUT_VARIABLE:
        return node
    if node.get("type") in ("integer", "number", "boolean") or "enum" in node:
        return _any_of(node, _VARIABLE)
    if "anyOf" in node:
        kept = [_or_variable(one) for one in node["anyOf"]]
        flat = _flat(kept)
        once = [one for number, one in enumerate(flat) if one not in flat[:number]]
        return {**{key: _or_variable(value) if key == "$defs" else value for key, value in node.items()}, "anyOf": once}
    inner = ("properties", "items", "additionalProperties", "$defs", "prefixItems")
    return {key: _inside(key, value) if key in inner else value for key, value in node.items()}


def _inside(key: str, value: Any) -> Any:
    if key in ("properties", "$defs") and isinstance(value, Mapping):
        return {name: _or_variable(one) for name, one in value.items()}
    return _or_variable(value)
