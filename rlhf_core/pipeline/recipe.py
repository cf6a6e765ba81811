"""A recipe: the YAML file of a pipeline, read into checked keys and one entry per stage. Importing this imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.config.capability_suites import CapabilitySuite, CapabilityTestsConfig
from rlhf_core.config.compression import LongPromptsConfig
from rlhf_core.config.file_paths import find_beside
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
    compress: LongPromptsConfig | None = Field(
        None,
        description="How stages that evaluate or sample compress long prompts, where they don't say so themselves; `compressor`"
        " may name a stage that trains one. Null reads prompts whole.",
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
    errors: tuple[RLHFError, ...] = ()
    """Mistakes of keys and of entries."""
    wrong: frozenset[str] = frozenset()
    """The keys of `recipe` that are wrong, and stand there with another value."""
    lost: frozenset[str] = frozenset()
    """Names of entries that can't be told what kind of stage they are, and aren't among the stages."""

    @property
    def names(self) -> list[str]:
        """The names of all stages."""
        return [*(one.name for one in self.stages), *self.lost]

    def to_yaml(self) -> str:
        """Return the recipe as a file with every key, secrets redacted."""
        return dump_yaml(redact(self.recipe.model_dump(mode="json")))


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

    What is wrong with keys and stages is kept in the result's `errors`, and the rest is read all the same, so that a check finds
    every mistake at once.

    Raises:
        ConfigError: the file can't be read.
        RecipeError: the keys don't go together; all mistakes are named.
    """
    if isinstance(recipe, Mapping):
        values, name, text = dict(recipe), "recipe", "# set in Python\n" + dump_yaml(redact(dict(recipe)))
        places = {"": name, **_keys(values, f"{name}: ")}
    else:
        values, places = load_yaml(recipe)
        values = find_beside(values, recipe, names=_names(values))
        name, text = str(recipe), redact_text(Path(recipe).read_text(encoding="utf-8-sig"))
    values |= changes or {}
    parsed, wrong, errors = _sound_keys(values, places)
    if parsed is None:
        raise RecipeError(errors, name)
    stages: list[StageEntry] = []
    lost: set[str] = set()
    for number, entry in enumerate(_listed(values)):
        stage, mistakes = _entry(number, entry, places, {*lost, *(one.name for one in stages)})
        errors += mistakes
        if stage is not None:
            stages.append(stage)
        elif isinstance(entry, Mapping) and isinstance(given := entry.get("name", entry.get("method")), str):
            lost.add(given)
    return RecipeFile(parsed, tuple(stages), places, text, tuple(errors), wrong, frozenset(lost))


def _names(values: Mapping[str, Any]) -> set[str]:
    """Return what the stages of a recipe may be called, so that such a text is no path."""
    stages = [one for one in _listed(values) if isinstance(one, Mapping)]
    return {one[key] for one in stages for key in ("name", "method", "kind") if isinstance(one.get(key), str)}


def _listed(values: Mapping[str, Any]) -> list[Any]:
    """Return the entries of a recipe's stages; none where they are no list."""
    stages = values.get("stages")
    return stages if isinstance(stages, list) else []


def _sound_keys(
    values: Mapping[str, Any], places: Mapping[str, str]
) -> tuple[Recipe | None, frozenset[str], list[RLHFError]]:
    """Return a recipe's keys without those that are wrong, which these are, and all mistakes, but for those of stages."""
    instead = {"model": "model", "output": "output", "stages": [{}]}
    entries = _listed(values)
    given = {**values, "stages": [{}] * len(entries)} if entries else dict(values)
    parsed, wrong, errors = Recipe.parse_sound(given, place=places, instead=instead)
    if parsed is None or "capabilities" not in wrong or not isinstance(values["capabilities"], Mapping):
        return parsed, wrong, errors
    # The suites beside a wrong one are looked at, too.
    suites = values["capabilities"].get("suites")
    sound = []
    for one in suites if isinstance(suites, list) else []:
        with suppress(ValidationError):
            sound.append(CapabilitySuite.model_validate(one))
    with suppress(ConfigError):  # two of one name
        parsed = parsed.updated(capabilities={"suites": sound} if sound else None)
    return parsed, wrong, errors


def _keys(values: Any, name: str, key: str = "") -> dict[str, str]:
    """Return dotted key → `recipe: stages[2].lora.rank`, for values that come from no file."""
    found: dict[str, str] = {}
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for part, value in items:
        shown = f"{name}[{part}]" if isinstance(values, list) else f"{name}{'.' if key else ''}{part}"
        dotted = f"{key}.{part}" if key else str(part)
        found |= {dotted: shown, **_keys(value, shown, dotted)}
    return found


def _entry(
    number: int, entry: Any, places: Mapping[str, str], names: Collection[str]
) -> tuple[StageEntry | None, list[RLHFError]]:
    """Return one stage of the list, and what is wrong with its kind and name; None where it can't be told of which kind it is.

    A stage whose name can't be one, or is taken, is returned under another.
    """
    at = f"stages.{number}"
    where = places.get(at, places[""])
    if not isinstance(entry, Mapping):
        fix = "write a group of options, such as `{method: sft, data: rows.jsonl}`"
        return None, [ConfigError("a stage must be a group of options", place=where, got=shortened(entry), fix=fix)]
    own = {key: places.get(f"{at}.{key}", where) for key in ("kind", "method", "name")}
    errors: list[RLHFError] = [
        ConfigError(f"`{key}` must be a name", place=place, got=shortened(entry[key]))
        for key, place in own.items()
        if entry.get(key) is not None and not isinstance(entry[key], str)
    ]
    kind, method, name = (entry[key] if isinstance(entry.get(key), str) else None for key in own)
    try:
        kind, method = _kind_and_method(kind, method, own, where, wrong=bool(errors))
    except ConfigError as error:
        errors.append(error)
        kind = None
    name = name or str(method or kind).replace(":", "-")
    if not _NAME.fullmatch(name):
        problem = "a stage's name is made of letters, digits, `-` and `_`"
        errors.append(ConfigError(problem, place=own["name"], got=f"`{name}`"))
    if name in names:
        fix = "give one of them another `name`"
        errors.append(ConfigError(f"two stages are named `{name}`", place=own["name"], fix=fix))
    if kind is None:
        return None, errors
    shown = f"(stage `{name}`)"
    inside = {
        key.removeprefix(f"{at}."): f"{place} {shown}" for key, place in places.items() if key.startswith(f"{at}.")
    }
    values = {key: value for key, value in entry.items() if key not in own}
    if not _NAME.fullmatch(name) or name in names:
        name = f"_{number + 1}"  # which no stage may be called
    return StageEntry(number + 1, name, kind, method, values, {"": f"{where} {shown}", **inside}), errors


def _kind_and_method(
    kind: str | None, method: str | None, places: Mapping[str, str], where: str, *, wrong: bool
) -> tuple[str | None, str | None]:
    """Return of which kind a stage is and its method; no kind where that is `wrong` already.

    Raises:
        ConfigError: it has neither, there is no such kind, or both name a trainer.
    """
    if kind is None and method is None:
        if wrong:
            return None, None
        fix = f"write `method: sft` (or another trainer), or `kind:` with one of {', '.join(KINDS)}"
        raise ConfigError("a stage says neither `kind` nor `method`", place=where, fix=fix)
    if kind is None or kind in (*KINDS, TRAIN):
        return kind or TRAIN, method
    # A trainer's name.
    if method not in (None, kind):
        fix = f"leave out one of them; a stage that isn't a training has as its kind one of {', '.join(KINDS)}"
        got = f"kind `{kind}` and method `{method}`"
        raise ConfigError("a training stage has one method", place=places["kind"], got=got, fix=fix)
    if kind not in registry.trainers and nearest(kind, KINDS):
        fix = did_you_mean(kind, [*KINDS, *registry.trainers])
        raise ConfigError(f"unknown kind of stage `{kind}`", place=places["kind"], fix=fix)
    return TRAIN, kind
