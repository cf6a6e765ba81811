"""A stage that trains: any trainer of the registry, run as `rlhf train FILE` runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlhf_core import registry
from rlhf_core.config.flags import refuse_unknown
from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.run_file import RunConfig
from rlhf_core.config.training import DatasetConfig, TrainingStage, models_beside
from rlhf_core.config.yaml_file import dump_yaml, overlay
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data.open_source import data_entries
from rlhf_core.infra.errors import ConfigError, RLHFError, nearest, shortened
from rlhf_core.infra.files import read_json, remove_tree, replace_file
from rlhf_core.pipeline.first_rows import check_first_rows
from rlhf_core.pipeline.recipe import every_error
from rlhf_core.pipeline.run_metrics import run_metrics, training_gain
from rlhf_core.pipeline.stage import (
    COMPRESSOR,
    POLICY,
    REWARD,
    Find,
    Need,
    Product,
    Stage,
    StageWork,
    check_model,
    reward_needs,
)
from rlhf_core.pipeline.stage_command import RunCommand
from rlhf_core.pipeline.stage_references import MODEL, references, resolved
from rlhf_core.registry.method_or_file import GivenValues, find_method
from rlhf_core.training.job import TrainingJob, load_job
from rlhf_core.training.resume_changes import MAY_CHANGE
from rlhf_core.training.run_directory import is_run

PROCESSES = "processes"
_REWARD = "reward"
_KINDS = {TrainingStage.REWARD: REWARD, TrainingStage.COMPRESSION: COMPRESSOR}
"""Kind of the model that a training of a stage makes, where that is no policy."""


class TrainStage(Stage):
    """A stage that trains a model. Its keys are those of a run's file, with `reward` (stages) and `processes` besides."""

    model_keys = (MODEL, _REWARD)
    method: type[Trainer[Any]] | None = None

    def _find_method(self) -> None:
        try:
            self.plugin, self.method = find_method({"method": self.entry.method}, self._places(), "trainer")
        except RLHFError as error:
            self.errors.append(error)
            self.makes = None
            return
        trained = [role for role, how in self.method.roles.items() if how.trained]
        main = POLICY if POLICY in trained else trained[0]
        kind = _KINDS.get(self.method.stage, POLICY)
        others = {f"{MODEL}_{role}": Product(role, f"{MODEL}_{role}") for role in trained if role != main}
        self.makes = {MODEL: Product(POLICY if main == POLICY else kind, MODEL), **others}

    def _completed(self) -> dict[str, Any]:
        values = dict(self.values)
        if self.method is None:
            return values
        fields = {*self.method.Config.model_fields, *RunConfig.KEYS}
        defaults = {key: value for key, value in self.recipe.recipe.defaults.items() if key in fields}
        values = overlay({"seed": self.recipe.recipe.seed, **defaults}, values)
        if _REWARD in values and _REWARD not in self.method.Config.model_fields:
            values["rewards"] = [*_as_list(values.get("rewards")), *self._rewards(values.pop(_REWARD))]
        return values

    def _rewards(self, given: Any) -> list[dict[str, Any]]:
        """Return the rewards by the models of stages, as the option `rewards` has them."""
        found = []
        for text in _as_list(given):
            reward = self.reward_by_stage(text)
            if isinstance(reward, Mapping):
                found.append(dict(reward))
                continue
            fix = "name a stage that trains a reward model; any other reward belongs in `rewards`"
            place, got = self.entry.place(_REWARD), shortened(text)
            self.errors.append(ConfigError("`reward` must be the name of a stage", place=place, got=got, fix=fix))
        return found

    def _needs(self) -> Sequence[Need]:
        if self.method is None:
            return ()
        model = (
            [Need(MODEL, (POLICY,), f"a policy: `{self.entry.method}` trains one")]
            if POLICY in self.method.roles
            or (self.method.stage == TrainingStage.COMPRESSION and self.values.get("reader") is None)
            else []
        )
        return [*model, *reward_needs("rewards", self.values.get("rewards"))]

    def check(self, find: Find) -> list[RLHFError]:
        if self.method is None:
            return []
        values = self._file(find, Path())
        errors: list[RLHFError] = []
        for key in [
            key for key in self.values if key not in (*self.method.Config.model_fields, *RunConfig.KEYS, PROCESSES)
        ]:
            try:
                refuse_unknown({key: None}, self.method.Config, str(self.entry.method), self._places(), RunConfig.KEYS)
            except ConfigError as error:
                errors.append(error)
            values.pop(key, None)
        if "output" in self.values:
            fix = "leave it out: a stage writes into the pipeline's directory"
            errors.append(ConfigError("a stage has no `output`", place=self.entry.place("output"), fix=fix))
        job: TrainingJob | None = None
        try:
            self._processes()
            job = load_job(GivenValues(values, self._places()))
        except RLHFError as error:
            errors += every_error(error)
        return [*errors, *self._data_errors(job, values), *self._model_errors(job)]

    def run(self, work: StageWork) -> dict[str, Any]:
        values = self._file(work.find, work.directory)
        return train(work.run, values, work.directory, file=work.file, processes=self._processes())

    def gain(self, metrics: Mapping[str, Any]) -> str:
        return training_gain(metrics)

    def identity(self) -> dict[str, Any]:
        free = {PROCESSES, *MAY_CHANGE}
        return {key: value for key, value in super().identity().items() if key not in free}

    def job(self, find: Find) -> TrainingJob:
        """Return the checked configuration of the run. Raises RLHFError where it isn't valid."""
        return load_job(GivenValues(self._file(find, Path()), self._places()))

    def trainer_options(self) -> set[str] | None:
        """Return the options of its method, of an unknown one those of the nearest; None where no name is near."""
        return trainer_options(self.entry.method)

    def _processes(self) -> int:
        count = self.values.get(PROCESSES, 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            place = self.entry.place(PROCESSES)
            raise ConfigError("`processes` must be a whole number, at least 1", place=place, got=shortened(count))
        return count

    def _file(self, find: Find, output: Path) -> dict[str, Any]:
        """Return the run's configuration file, as values."""
        values = {key: value for key, value in resolved(self.values, find).items() if key not in (PROCESSES, "output")}
        head = {"method": self.entry.method, MODEL: values.pop(MODEL), "data": values.pop("data", None)}
        return {**head, "output": str(output), **values}

    def _places(self) -> dict[str, str]:
        """Return where each key was set: in the stage, else among the recipe's defaults."""
        defaults = {
            key.removeprefix("defaults."): place
            for key, place in self.recipe.places.items()
            if key.startswith("defaults.")
        }
        return {**defaults, **self.entry.places}

    # Data and models

    def _data_errors(self, job: TrainingJob | None, values: Mapping[str, Any]) -> list[RLHFError]:
        """Return what is wrong with the first rows of each file; rows that an earlier stage will make aren't there yet."""
        if job is not None:
            options, record = job.options.dataset, job.method.record_type(job.options)
        else:
            options, record = _dataset_options(values), self.method.record if self.method is not None else ""
        errors: list[RLHFError] = []
        for key in ("data", "eval_data"):
            given = self.values.get(key)
            if given is None or list(references(given)):
                continue
            try:
                entries = data_entries([given] if isinstance(given, Mapping) else given) or []
            except RLHFError:  # of the options, which name it
                continue
            split = options.eval_split if key == "eval_data" else options.split
            consumer = f"`{self.entry.method}`"
            for entry in entries:
                own = entry.options(options, split)
                errors += check_first_rows(
                    str(entry.path), record, own, own.split, consumer=consumer, place=self.entry.place(key)
                )
        return errors

    def _model_errors(self, job: TrainingJob | None) -> list[RLHFError]:
        """Return what is wrong with the models that it names and no stage makes."""
        errors: list[RLHFError] = []
        for key, source in [(MODEL, self.values.get(MODEL)), *_models_of(job)]:
            if isinstance(source, str) and not list(references(source)):
                if source == self.recipe.recipe.model and MODEL not in self.entry.values and key == MODEL:
                    continue  # the recipe's own, checked once
                if not _is_product(source, self):
                    errors += check_model(source, self.entry.place(key), self.earlier)
        return errors


def train(
    run: RunCommand, values: Mapping[str, Any], directory: Path, *, file: Path, processes: int = 1
) -> dict[str, Any]:
    """Train by `rlhf train`, or continue a run that was stopped or killed; return its metrics.

    Args:
        values: the run's configuration.
        directory: the run's, as among the values.
        file: where the configuration is written.
    """
    replace_file(file, dump_yaml(values).encode())
    continued = directory.is_dir() and is_run(directory)
    if not continued and directory.is_dir():
        remove_tree(directory)  # killed before its record was written
    # A run that is done ended just before the pipeline was killed.
    if not (continued and read_json(directory / "run.json").get("status") == "done"):
        more = ["--resume"] if continued else []
        run(["train", str(file), *more], log=file.with_suffix(".log"), processes=processes)
    return run_metrics(directory)


def trainer_options(name: Any) -> set[str] | None:
    """Return the options of a trainer, of an unknown name those of the nearest one; None where none is near, or it is broken."""
    known = registry.trainers
    try:
        plugin = registry.get("trainer", str(name) if name in known else nearest(str(name), known) or str(name))
    except RLHFError:
        return None
    return {*plugin.Config.model_fields}


def _models_of(job: TrainingJob | None) -> Iterator[tuple[str, Any]]:
    """Yield key and path of the models beside the main one: roles of the method, and models of rewards."""
    if job is None:
        return
    for role, model in models_beside(job.options).items():
        yield role, model.path
    if isinstance(job.options, OnlineConfig):
        for number, reward in enumerate(job.options.rewards):
            yield f"rewards.{number}", reward.options.get("model")


def _is_product(source: str, stage: Stage) -> bool:
    """Tell whether a path is that of what an earlier stage will make."""
    output = str(Path(stage.recipe.recipe.output).expanduser().absolute())
    return source.startswith(f"{output}/stages/")


def _dataset_options(values: Mapping[str, Any]) -> DatasetConfig:
    """Return the options of reading rows; the defaults where those given aren't valid."""
    try:
        given = values.get("dataset")
        return DatasetConfig.model_validate(given) if isinstance(given, Mapping) else DatasetConfig()
    except ValidationError:
        return DatasetConfig()


def _as_list(value: Any) -> list[Any]:
    """Return a list of what may be one thing, several, or nothing."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]
