"""The JSON schema of recipes, in which each stage has the options of its method, or of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_core import registry
from rlhf_core.config.json_schema import file_schema
from rlhf_core.infra.errors import RLHFError
from rlhf_core.registry.discovery import Plugin

Make = Callable[[Plugin, Any], dict[str, Any]]
"""Makes the schema of a method's file from the plugin and its class."""

_OF_STAGES: dict[str, Any] = {
    "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]*$", "description": "Its name; null takes the method's."},
    "kind": {"description": "What the stage does; a trainer's name in `method` is enough."},
    "method": {"type": "string", "description": "A trainer, sampler or merger, whose options stand beside it."},
}  # fmt: skip
"""Keys of every stage."""
_OF_TRAINING: dict[str, Any] = {
    "reward": {
        "description": "Stages that train reward models, by name, whose scores are rewards of this one.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    },
    "processes": {"type": "integer", "minimum": 1, "description": "Processes that train together on this machine."},
}
"""Keys of a training stage beside those of a run's file."""
_OF_EVALUATION = {
    "compare": {"type": "string", "description": "An earlier evaluation, to which differences are given."}
}
_OF_MERGE = {"evaluate": {"type": "string", "description": "What `rlhf merge --evaluate` takes: `FILE.py:FUNCTION`."}}
_OF_COMPARISON = {
    "check": {"type": "string", "description": "Reward that tells right answers from wrong ones."},
    "repeats": {"type": "integer", "minimum": 1, "description": "How often each sampler answers."},
}
"""Keys of a stage that compares samplers."""


def recipe_schema(
    make: Mapping[str, Make], evaluation: Callable[[], dict[str, Any]], names_of: Callable[[Plugin], list[str]]
) -> dict[str, Any]:
    """Return the schema of a recipe. Of methods that can't be used nothing is known, and their stages may hold anything.

    Args:
        make: kind of plugin → what makes the schema of its file.
        evaluation: makes that of an evaluation's file.
        names_of: returns the names by which a file may call a method.
    """
    from rlhf_core.pipeline.recipe import KINDS, TRAIN, Recipe

    schema = file_schema([Recipe], title="Recipe of `rlhf run`", required=["stages"])
    properties = {**_OF_STAGES, "kind": {**_OF_STAGES["kind"], "enum": [TRAIN, *KINDS, *registry.trainers]}}
    stages = _Stages(properties, schema["$defs"], make, names_of)
    typed = [*stages.training(TRAIN), *stages.evaluation(evaluation()), *stages.sampling(), *stages.merging()]
    schema["properties"]["stages"] |= {
        "items": {
            "type": "object",
            "properties": properties,
            "anyOf": [{"required": ["kind"]}, {"required": ["method"]}],
            "allOf": [*typed, stages.improvement()],
        }
    }
    return schema


class _Stages:
    """What stages may hold, as conditions on their kind and method.

    Args:
        properties: those of every stage.
        definitions: of the whole schema; what stages need is added.
        make, names_of: as in `recipe_schema`.
    """

    def __init__(
        self,
        properties: Mapping[str, Any],
        definitions: dict[str, Any],
        make: Mapping[str, Make],
        names_of: Callable[[Plugin], list[str]],
    ) -> None:
        self.properties, self.definitions, self.make, self.names_of = properties, definitions, make, names_of

    def training(self, kind: str) -> Iterator[dict[str, Any]]:
        """Yield for each trainer what a stage of it may hold."""
        for plugin, own in self._methods("trainer"):
            names = self.names_of(plugin)
            by_method = {
                "properties": {"method": {"enum": names}, "kind": {"enum": [kind, *names]}},
                "required": ["method"],
            }
            by_kind = {"properties": {"kind": {"enum": names}}, "required": ["kind"]}
            yield self._typed({"anyOf": [by_method, by_kind]}, plugin.name, own, _OF_TRAINING)

    def evaluation(self, prompts: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield what an evaluation on prompts may hold, and one of lm-eval's tasks."""
        from rlhf_core.config.lm_eval_run import LmEvalRunConfig

        tasks = {"required": ["tasks"]}
        yield self._typed({**_of("evaluate"), "not": tasks}, "evaluate", prompts, _OF_EVALUATION, but=("method",))
        own = file_schema([LmEvalRunConfig], title="")
        yield self._typed({"allOf": [_of("evaluate"), tasks]}, "tasks", own, but=("method",))

    def sampling(self) -> Iterator[dict[str, Any]]:
        """Yield for each sampler what a stage of it may hold, and what a comparison of several may."""
        from rlhf_core.config.sampling_run import SamplingRunConfig

        several: dict[str, Any] = {"required": ["samplers"]}
        groups: list[dict[str, Any]] = []
        options: set[str] = set()
        for plugin, own in self._methods("sampler"):
            own["properties"] = {key: _or_one(about) for key, about in own["properties"].items()}
            options |= own["properties"].keys()
            condition = {"properties": {"method": {"enum": self.names_of(plugin)}}, "required": ["method"]}
            stage = self._typed(condition, plugin.name, own)
            groups.append(stage)
            yield {**stage, "if": {"allOf": [_of("sample"), condition], "not": several}}
        own = file_schema([SamplingRunConfig], title="")
        # What all samplers share may be any of their options.
        shared: dict[str, Any] = {key: {} for key in options - own["properties"].keys()}
        group = {"type": "object", "required": ["method"], "allOf": groups}
        listed = {
            "samplers": {"type": "array", "items": group, "minItems": 1, "description": "Samplers that are compared."}
        }
        compares = {"allOf": [_of("sample"), several]}
        yield self._typed(compares, "samplers", own, {**_OF_COMPARISON, **shared, **listed}, but=("method",))

    def merging(self) -> Iterator[dict[str, Any]]:
        """Yield for each merger what a stage of it may hold."""
        for plugin, own in self._methods("merger"):
            condition = {"properties": {"method": {"enum": self.names_of(plugin)}}, "required": ["method"]}
            yield self._typed({"allOf": [_of("merge"), condition]}, plugin.name, own, _OF_MERGE)

    def improvement(self) -> dict[str, Any]:
        """Return what a stage of self-improvement may hold; its sampler and its training have the options of their methods."""
        from rlhf_core.config.improvement_round import SAMPLED, TRAINED, TRAINER, ImprovementConfig

        own = file_schema([ImprovementConfig], title="")
        about = {name: own["properties"][name] for name in ("sampler", "train")}
        inner = {
            "sampler": {**about["sampler"], **self._inner("sampler", SAMPLED), "required": ["method"]},
            "train": {**about["train"], **self._inner("trainer", TRAINED, without=TRAINER)},
        }
        return self._typed(_of("improve"), "improve", own, inner, but=("method",))

    def _inner(self, kind: str, but: Sequence[str], without: str | None = None) -> dict[str, Any]:
        """Return what a group of a stage may hold: a method's name, or a method and its options.

        Args:
            kind: of the method.
            but: keys of the method's file that the stage sets itself.
            without: the method of a group that names none.
        """
        typed = []
        for plugin, own in self._methods(kind):
            condition: dict[str, Any] = {"type": "object", "properties": {"method": {"enum": self.names_of(plugin)}}}
            if plugin.name != without:
                condition["required"] = ["method"]
            stage = self._typed(condition, plugin.name, own)
            keys = {name: one for name, one in stage["then"]["properties"].items() if name in own["properties"]}
            inner = {"method": self.properties["method"], **keys}
            for name in ("output", *but):
                inner.pop(name, None)
            typed.append({"if": condition, "then": {**stage["then"], "properties": inner}})
        return {"type": ["string", "object"], "allOf": typed}

    def _methods(self, kind: str) -> Iterator[tuple[Plugin, dict[str, Any]]]:
        """Yield the methods of a kind that can be used, with the schemas of their files."""
        for plugin in registry.find(kind):
            if plugin.status != "ok":
                continue
            try:
                own = registry.ask(plugin, partial(self.make[kind], plugin))
            except RLHFError:
                continue
            yield plugin, own

    def _typed(
        self,
        condition: Mapping[str, Any],
        label: str,
        own: Mapping[str, Any],
        more: Mapping[str, Any] | None = None,
        *,
        but: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return that a stage of which a condition holds has the keys of a file's schema, but for `output`, and no others.

        Args:
            label: what definitions are named by that differ from another's of the same name.
            more: further keys, which count before the file's.
            but: keys of every stage that it doesn't have.
        """
        other = {
            name: f"{label}.{name}"
            for name, one in own["$defs"].items()
            if self.definitions.setdefault(name, one) != one
        }
        self.definitions |= {new: _renamed(own["$defs"][old], other) for old, new in other.items()}
        keys = {name: about for name, about in own["properties"].items() if name not in ("output", *but)}
        every = {name: about for name, about in self.properties.items() if name not in ("method", *but)}
        stage = _renamed({**keys, **every}, other)
        return {
            "if": condition,
            "then": {"type": "object", "properties": {**stage, **(more or {})}, "additionalProperties": False},
        }


def _of(kind: str) -> dict[str, Any]:
    """Return the condition that a stage is of a kind."""
    return {"properties": {"kind": {"enum": [kind]}}, "required": ["kind"]}


def _or_one(about: dict[str, Any]) -> dict[str, Any]:
    """Return an option that may be a list so that one item stands for a list of one, as a sampler's models may."""
    items = [
        one["items"] for one in about.get("anyOf", ()) if one.get("type") == "array" and "$ref" in one.get("items", {})
    ]
    return {**about, "anyOf": [*about["anyOf"], *items]} if items else about


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
