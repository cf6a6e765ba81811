"""A recipe as a plan: its stages in order, each of its kind, with all that is wrong with any of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.config.run_file import RunConfig
from rlhf_core.infra.errors import ConfigError, RLHFError, did_you_mean
from rlhf_core.pipeline.evaluate_stage import EvaluateStage
from rlhf_core.pipeline.improve_stage import ImproveStage
from rlhf_core.pipeline.merge_stage import MergeStage
from rlhf_core.pipeline.recipe import RecipeFile, StageEntry
from rlhf_core.pipeline.sample_stage import SampleStage
from rlhf_core.pipeline.stage import Stage, check_model, placed
from rlhf_core.pipeline.train_stage import TrainStage

STAGES: dict[str, type[Stage]] = {
    "train": TrainStage,
    "evaluate": EvaluateStage,
    "improve": ImproveStage,
    "sample": SampleStage,
    "merge": MergeStage,
}
"""Kind of a stage → its class."""


class PipelinePlan:
    """The stages of a recipe, planned.

    Args:
        recipe: as `read_recipe` returns it.
    """

    def __init__(self, recipe: RecipeFile) -> None:
        self.recipe = recipe
        self.output = Path(recipe.recipe.output).expanduser().absolute()
        self.stages: dict[str, Stage] = {}
        self._directories: dict[str, str] = {}
        """Name of a stage → its directory, relative to the pipeline's, once `settle` was told which ones are in use."""
        for entry in recipe.stages:
            self._add(entry)

    def _add(self, entry: StageEntry) -> None:
        self.stages[entry.name] = STAGES[entry.kind](entry, self.recipe, dict(self.stages))

    def settle(self, recorded: Mapping[str, str]) -> None:
        """Give each stage its directory: the one that it has had before, whatever its number is now, else one of its own.

        Args:
            recorded: name of a stage that was run before → its directory.
        """
        # Without regard to case, as some file systems name files.
        taken = {directory.casefold() for directory in recorded.values()}
        for name, stage in self.stages.items():
            directory = recorded.get(name)
            if directory is None:
                new = stage.entry.directory
                tries = itertools.chain([new], (f"{new}-{number}" for number in itertools.count(2)))
                directory = next(one for one in tries if one.casefold() not in taken)
                taken.add(directory.casefold())
            self._directories[name] = directory

    def directory(self, stage: Stage) -> Path:
        """Return a stage's directory."""
        return self.output / self._directories.get(stage.entry.name, stage.entry.directory)

    def find(self, stage: str, product: str) -> str:
        """Return the path that a stage's product will have; a path that names no product where the reference is wrong."""
        made = self.stages.get(stage)
        path = (made.makes or {}).get(product) if made is not None else None
        if made is None or path is None:
            return str(self.output / "stages" / stage / product)
        return str(self.directory(made) / path.path)

    def dependents(self, name: str) -> list[str]:
        """Return the stages that take what a stage makes, and those that take what they make."""
        found: list[str] = []
        for other, stage in self.stages.items():
            if any(one == name or one in found for one in stage.needed):
                found.append(other)
        return found

    def check(self) -> list[RLHFError]:
        """Return everything that is wrong with the recipe, in the order of its stages; nothing is run or written."""
        recipe = self.recipe.recipe
        errors: list[RLHFError] = [*self.recipe.errors, *self._default_errors()]
        if "model" not in self.recipe.wrong:
            errors += check_model(recipe.model, self.recipe.places.get("model", self.recipe.places[""]))
        errors += self._capability_errors()
        for stage in self.stages.values():
            errors += [*stage.errors, *stage.check(self.find)]
        seen: dict[str, RLHFError] = {}
        for error in errors:
            seen.setdefault(error.line(), error)
        return list(seen.values())

    def _default_errors(self) -> list[RLHFError]:
        """Return an error for each default that no stage has as an option; none where a stage's method can't even be guessed."""
        known: set[str] = {*RunConfig.KEYS}
        if "stages" in self.recipe.wrong:
            return []
        for stage in self.stages.values():
            if not isinstance(stage, TrainStage | ImproveStage):
                continue
            options = stage.trainer_options()
            if options is None:
                return []
            known |= options
        return [
            ConfigError(
                f"no stage's method has the option `{key}`",
                place=self.recipe.places.get(f"defaults.{key}", self.recipe.places[""]),
                fix=did_you_mean(str(key), known),
            )
            for key in self.recipe.recipe.defaults
            if key not in known
        ]

    def _capability_errors(self) -> list[RLHFError]:
        """Return what is wrong with the suites: a validator that isn't there, prompts that can't be read."""
        config = self.recipe.recipe.capabilities
        if config is None:
            return []
        from rlhf_core.improvement.capability_tests import suite_errors

        place = self.recipe.places.get("capabilities", self.recipe.places[""])
        return [placed(error, f"{place} (suite `{suite}`)") for suite, error in suite_errors(config)]

    def as_rows(self) -> list[dict[str, Any]]:
        """Return what a table of the stages shows, as JSON values."""
        return [
            {
                "stage": stage.entry.name,
                "kind": stage.entry.kind,
                "method": stage.plugin.qualified if stage.plugin is not None else stage.entry.method,
                "from": [str(one) for one in stage.references] or stage.input_models(),
                "makes": sorted(stage.makes or {}),
            }
            for stage in self.stages.values()
        ]
