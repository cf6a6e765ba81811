"""The JSON schemas of all kinds of configuration files, by a method's name or the kind of file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from rlhf_core import registry
from rlhf_core.config.json_schema import file_schema
from rlhf_core.infra.errors import ConfigError, RLHFError
from rlhf_core.registry.discovery import Plugin
from rlhf_core.registry.distributions import WITHOUT_CLASS


def schema_of(name: str) -> dict[str, Any]:
    """Return the schema of a method's file, of the files of a command (`evaluate` …), or of a reward's options.

    Raises:
        ConfigError: there is no such method or kind of file, or it has no options.
        PluginError: the method is broken, ambiguous or disabled.
    """
    if name in FILES:
        return FILES[name]()
    plugin = registry.lookup(name)
    if plugin.kind in WITHOUT_CLASS:
        problem = f"a {plugin.kind} has no schema of options"
        raise ConfigError(problem, place=f"{plugin.kind} `{name}`", fix="name a method")
    make = {"trainer": _training, "sampler": _sampling, "merger": _merging}.get(plugin.kind)
    if make is None:
        return registry.ask(plugin, lambda cls: cls.Config.model_json_schema())
    return registry.ask(plugin, lambda cls: make(plugin, cls))


def names_of(plugin: Plugin) -> list[str]:
    """Return the names by which a file may call a method."""
    return list(dict.fromkeys((plugin.name, f"{plugin.distribution}:{plugin.name}", plugin.qualified)))


def _training(plugin: Plugin, cls: Any) -> dict[str, Any]:
    from rlhf_core.config.run_file import RunConfig

    title = f"Configuration of `rlhf train`: {plugin.name}"
    return file_schema([RunConfig, cls.Config], title=title, methods=names_of(plugin), required=["method"])


def _sampling(plugin: Plugin, cls: Any) -> dict[str, Any]:
    from rlhf_core.config.sampling_run import run_config_of

    title = f"Configuration of `rlhf sample`: {plugin.name}"
    run = run_config_of(cls.roles, sampler=plugin.name)
    schema = file_schema([run, cls.Config], title=title, required=["method"])
    schema["properties"] = {"method": {"enum": names_of(plugin)}, **schema["properties"]}
    return schema


def _merging(plugin: Plugin, cls: Any) -> dict[str, Any]:
    from rlhf_core.merging.config import MergeConfig

    title = f"Configuration of `rlhf merge`: {plugin.name}"
    schema = file_schema([MergeConfig, cls.Config], title=title, methods=names_of(plugin), required=["method"])
    properties, entry = schema["properties"], schema["$defs"]["ModelEntry"]
    del properties["options"]  # they stand beside the keys
    for option in cls.Config.model_fields.keys() - MergeConfig.model_fields.keys():
        if any(one.get("type") in ("number", "integer") for one in properties[option].get("anyOf", ())):
            # A gradient over the layers, or per-layer values.
            properties[option]["anyOf"] += [{"type": "array"}, {"type": "object"}]
    properties["compat"] = {"enum": ["mergekit"], "description": "Set options to what mergekit does."}
    # A model's own options stand beside its name; a name alone is a model of weight 1.
    entry["additionalProperties"] = True
    schema["$defs"]["ModelEntry"] = {"anyOf": [entry, {"type": "string"}]}
    return schema


def _recipe() -> dict[str, Any]:
    from rlhf_core.pipeline.recipe import KINDS, TRAIN, Recipe

    schema = file_schema([Recipe], title="Recipe of `rlhf run`", required=["stages"])
    kinds = [TRAIN, *KINDS, *registry.trainers]
    properties = {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]*$", "description": "Its name; null takes the method's."},
        "kind": {"enum": kinds, "description": "What the stage does; a trainer's name in `method` is enough."},
        "method": {
            "type": "string",
            "description": "A trainer, sampler or merger, whose options stand beside it.",
        },
    }  # fmt: skip
    schema["properties"]["stages"] |= {
        "items": {
            "type": "object",
            "properties": properties,
            "anyOf": [{"required": ["kind"]}, {"required": ["method"]}],
            "allOf": list(_training_stages(properties, schema["$defs"])),
        }
    }
    return schema


def _training_stages(properties: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each trainer what a stage of it may hold; of a trainer that can't be used, nothing is known.

    Args:
        properties: those of every stage.
        definitions: of the whole schema; what stages need is added.
    """
    from rlhf_core.pipeline.recipe import TRAIN

    for plugin in registry.find("trainer"):
        if plugin.status != "ok":
            continue
        try:
            own = registry.ask(plugin, partial(_training, plugin))
        except RLHFError:
            continue
        keys = {name: about for name, about in own["properties"].items() if name != "output"}
        stage = {**_OF_TRAINING, **keys, **{name: one for name, one in properties.items() if name != "method"}}
        other = {
            name: f"{plugin.name}.{name}"
            for name, one in own["$defs"].items()
            if definitions.setdefault(name, one) != one
        }
        definitions |= {new: _renamed(own["$defs"][old], other) for old, new in other.items()}
        names = names_of(plugin)
        by_method = {
            "properties": {"method": {"enum": names}, "kind": {"enum": [TRAIN, *names]}},
            "required": ["method"],
        }
        by_kind = {"properties": {"kind": {"enum": names}}, "required": ["kind"]}
        then = {"type": "object", "properties": _renamed(stage, other), "additionalProperties": False}
        yield {"if": {"anyOf": [by_method, by_kind]}, "then": then}


_OF_TRAINING: dict[str, Any] = {
    "reward": {
        "description": "Stages that train reward models, by name, whose scores are rewards of this one.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    },
    "processes": {"type": "integer", "minimum": 1, "description": "Processes that train together on this machine."},
}
"""Keys of a training stage beside those of a run's file."""


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """Return a schema whose references to definitions have other names."""
    if isinstance(node, list):
        return [_renamed(one, names) for one in node]
    if not isinstance(node, Mapping):
        return node
    found = {key: _renamed(value, names) for key, value in node.items()}
    if isinstance(reference := node.get("$ref"), str):
        name = reference.removeprefix("#/$defs/")
        found["$ref"] = f"#/$defs/{names.get(name, name)}"
    return found


def _evaluation() -> dict[str, Any]:
    from rlhf_core.config.evaluation import EvaluationRunConfig

    return file_schema([EvaluationRunConfig], title="Configuration of `rlhf evaluate`")


def _suites() -> dict[str, Any]:
    from rlhf_core.config.capability_suites import CapabilityTestsConfig

    return file_schema([CapabilityTestsConfig], title="Suites of `rlhf test-capabilities`", required=["suites"])


FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "recipe": _recipe,
    "evaluate": _evaluation,
    "test-capabilities": _suites,
}
"""Kinds of files that no method names, by the command that takes them, and a recipe."""
