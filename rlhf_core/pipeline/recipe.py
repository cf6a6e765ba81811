"""A recipe: the YAML file of a pipeline, read into checked keys and one entry per stage. Importing this imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.config.capability_suites import CapabilityTestsConfig
from rlhf_core.config.yaml_file import dump_yaml, load_yaml
from rlhf_core.infra.errors import ConfigError, RLHFError, did_you_mean, nearest, shortened
from rlhf_core.infra.redact import redact, redact_text

KINDS = ("evaluate", "improve", "sample", "merge")
"""Kinds of stages that aren't a trainer's."""
TRAIN = "train"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class RollbackConfig(BaseConfig):
    """When a policy is given up for the last good one, and what follows."""

    on_regression: Literal["continue", "stop"] = Field(
        "continue",
        description="After a regression: `continue` runs the later stages on the last good policy, `stop` ends the pipeline."
        " Either way the exit code says that a policy was given up.",
    )
    on_error: Literal["continue", "stop"] = Field(
        "stop",
        description="After a stage that failed: `stop` ends the pipeline, `continue` runs the later stages on the last good"
        " policy, without those that need what the stage would have made. Either way the exit code is the failure's.",
    )


class Recipe(BaseConfig):
    """The keys of a recipe."""

    model: str = Field(min_length=1, description="Path or hub name of the model that the first stage begins with.")
    output: str = Field(
        min_length=1, description="Directory of the pipeline: its record, and the results of all stages."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of every stage that sets none; another value draws otherwise."
    )
    defaults: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of every training stage whose method has them, where the stage sets none.",
    )
    capabilities: CapabilityTestsConfig | None = Field(
        None,
        description="Suites of capability tests, run before and after each stage that makes a policy, and what counts as a"
        " regression; null runs none.",
    )
    rollback: RollbackConfig = Field(
        default_factory=RollbackConfig, description="When a policy is given up for the last good one, and what follows."
    )
    stages: list[dict[str, Any]] = Field(min_length=1, description="The stages, in their order.")


@dataclass(frozen=True)
class StageEntry:
    """One stage as a recipe has it: a name, a kind, a method, and all other keys flat."""

    number: int
    """Its place in the recipe, from 1."""
    name: str
    kind: str
    """`train`, or one of `KINDS`."""
    method: str | None
    """Name of the trainer, sampler or merger; None for kinds without one."""
    values: Mapping[str, Any]
    """The other keys."""
    places: Mapping[str, str]
    """Where each dotted key was set, of the whole entry under ''."""

    @property
    def directory(self) -> str:
        """The directory of a stage that is new, relative to the pipeline's; one that was run before keeps its own."""
        return f"stages/{self.number:02}-{self.name}"

    def place(self, key: str = "") -> str:
        """Return where a dotted key was set, else where the nearest group around it was."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places[key]


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it was read: its keys, its stages, and what is wrong with them so far."""

    recipe: Recipe
    stages: tuple[StageEntry, ...]
    places: Mapping[str, str]
    text: str
    """The file's text, secrets redacted."""
    errors: tuple[RLHFError, ...] = field(default=())
    """Mistakes of entries, which aren't among the stages."""

    def to_yaml(self) -> str:
        """Return the recipe as a file with every key, secrets redacted."""
        values = self.recipe.model_dump(mode="json")
        return dump_yaml({key: redact(value, key) for key, value in values.items()})


class RecipeError(ConfigError):
    """All mistakes of a recipe."""

    def __init__(self, errors: list[RLHFError], place: str) -> None:
        self.errors = errors
        count = f"{len(errors)} mistakes" if len(errors) != 1 else "1 mistake"
        super().__init__(f"{count} in the recipe", place=place, got="; ".join(str(one) for one in errors))

    def __reduce__(self) -> tuple[object, ...]:
        return (RecipeError, (self.errors, self.place or ""))


def every_error(error: RLHFError) -> list[RLHFError]:
    """Return an error and those that were found with it."""
    return [error, *error.also]


def read_recipe(recipe: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> RecipeFile:
    """Read a recipe from a YAML file or from plain values of the same shape.

    Args:
        changes: keys in place of the recipe's, such as `output`.

    Raises:
        RecipeError: a key is unknown, missing or wrong; all such keys are named. Mistakes in single stages are kept in the
            result's `errors`.
    """
    if isinstance(recipe, Mapping):
        values, name, text = dict(recipe), "recipe", "# set in Python\n" + dump_yaml(redact(dict(recipe)))
        places = {"": name, **_keys(values, f"{name}: ")}
    else:
        values, places = load_yaml(recipe)
        name, text = str(recipe), redact_text(Path(recipe).read_text(encoding="utf-8-sig"))
    values |= changes or {}
    try:
        parsed = Recipe.parse(values, place=places)
    except ConfigError as error:
        raise RecipeError(every_error(error), name) from None
    stages: list[StageEntry] = []
    errors: list[RLHFError] = []
    for number, entry in enumerate(parsed.stages):
        try:
            stages.append(_entry(number, entry, places, [one.name for one in stages]))
        except ConfigError as error:
            errors.append(error)
    return RecipeFile(parsed, tuple(stages), places, text, tuple(errors))


def _keys(values: Any, name: str, key: str = "") -> dict[str, str]:
    """Return dotted key → `recipe: stages[2].lora.rank`, for values that come from no file."""
    found: dict[str, str] = {}
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for part, value in items:
        shown = f"{name}[{part}]" if isinstance(values, list) else f"{name}{'.' if key else ''}{part}"
        dotted = f"{key}.{part}" if key else str(part)
        found |= {dotted: shown, **_keys(value, shown, dotted)}
    return found


def _entry(number: int, entry: Mapping[str, Any], places: Mapping[str, str], names: list[str]) -> StageEntry:
    """Return one stage of the list, after checking its name and kind.

    Raises:
        ConfigError: it has no kind, its name can't be one, or is that of an earlier stage.
    """
    at = f"stages.{number}"
    where = places.get(at, places[""])
    kind, method = entry.get("kind"), entry.get("method")
    for key, value in (("kind", kind), ("method", method), ("name", entry.get("name"))):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"`{key}` must be a name", place=places.get(f"{at}.{key}", where), got=shortened(value))
    if kind is None and method is None:
        fix = f"write `method: sft` (or another trainer), or `kind:` with one of {', '.join(KINDS)}"
        raise ConfigError("a stage says neither `kind` nor `method`", place=where, fix=fix)
    if kind is not None and kind not in (*KINDS, TRAIN):  # a trainer's name
        if method not in (None, kind):
            fix = f"leave out one of them; a stage that isn't a training has as its kind one of {', '.join(KINDS)}"
            got = f"kind `{kind}` and method `{method}`"
            raise ConfigError(
                "a training stage has one method", place=places.get(f"{at}.kind", where), got=got, fix=fix
            )
        if kind not in registry.trainers and nearest(kind, KINDS):
            fix = did_you_mean(kind, [*KINDS, *registry.trainers])
            raise ConfigError(f"unknown kind of stage `{kind}`", place=places.get(f"{at}.kind", where), fix=fix)
        kind, method = TRAIN, kind
    name = entry.get("name") or str(method or kind).replace(":", "-")
    if not _NAME.fullmatch(name):
        problem = "a stage's name is made of letters, digits, `-` and `_`"
        raise ConfigError(problem, place=places.get(f"{at}.name", where), got=f"`{name}`")
    if name in names:
        fix = "give one of them another `name`"
        raise ConfigError(f"two stages are named `{name}`", place=places.get(f"{at}.name", where), fix=fix)
    own = {"": f"{where} (stage `{name}`)"} | {
        key.removeprefix(f"{at}."): f"{place} (stage `{name}`)"
        for key, place in places.items()
        if key.startswith(f"{at}.")
    }
    values = {key: value for key, value in entry.items() if key not in ("name", "kind", "method")}
    return StageEntry(number + 1, name, kind or TRAIN, method, values, own)
