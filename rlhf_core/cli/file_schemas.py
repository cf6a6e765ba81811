"""The JSON schemas of all kinds of configuration files, by a method's name or the kind of file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_core import registry
from rlhf_core.cli.recipe_schema import recipe_schema
from rlhf_core.config.json_schema import file_schema
from rlhf_core.infra.errors import ConfigError
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
    make = _OF_KIND.get(plugin.kind)
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


def _evaluation() -> dict[str, Any]:
    from rlhf_core.config.evaluation import EvaluationRunConfig

    return file_schema([EvaluationRunConfig], title="Configuration of `rlhf evaluate`")


def _suites() -> dict[str, Any]:
    from rlhf_core.config.capability_suites import CapabilityTestsConfig

    return file_schema([CapabilityTestsConfig], title="Suites of `rlhf test-capabilities`", required=["suites"])


_OF_KIND: dict[str, Callable[[Plugin, Any], dict[str, Any]]] = {
    "trainer": _training,
    "sampler": _sampling,
    "merger": _merging,
}
"""Kind of plugin → what makes the schema of its file, of the plugin and its class."""

FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "recipe": lambda: recipe_schema(_OF_KIND, _evaluation, names_of),
    "evaluate": _evaluation,
    "test-capabilities": _suites,
}
"""Kinds of files that no method names, by the command that takes them, and a recipe."""
