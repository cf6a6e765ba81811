"""A stage that evaluates a policy, run as `rlhf evaluate FILE` runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.config.evaluation import EvaluationRunConfig
from rlhf_core.config.flags import refuse_unknown
from rlhf_core.config.lm_eval_run import LmEvalRunConfig
from rlhf_core.config.yaml_file import dump_yaml
from rlhf_core.evaluation.evaluation_job import load_evaluation_run
from rlhf_core.evaluation.evaluation_report import EvaluationReport
from rlhf_core.evaluation.evaluator import COMPLETIONS_FILE
from rlhf_core.evaluation.lm_eval_tasks import find_tasks
from rlhf_core.infra.errors import ConfigError, Mistakes, RLHFError, nearest
from rlhf_core.infra.files import replace_file
from rlhf_core.pipeline.recipe import every_error
from rlhf_core.pipeline.stage import (
    COMPRESS,
    COMPRESSOR_NEED,
    POLICY,
    Find,
    Need,
    Product,
    Stage,
    StageWork,
    check_model,
    check_prompts,
    placed,
    reward_needs,
)
from rlhf_core.pipeline.stage_references import MODEL, references, resolved, written
from rlhf_core.registry.method_or_file import GivenValues

EVALUATION = "evaluation"
"""The product, and the kind of it."""
_TASKS = "tasks"
"""The key whose stage does tasks of lm-eval."""
_COMPARE, _REWARDS = "compare", ("reward", "validator")
_REFERENCE = "reference"
_OF_PROMPTS = EvaluationRunConfig.model_fields.keys() - LmEvalRunConfig.model_fields.keys()
"""Options of an evaluation on prompts alone."""
_TELLING = ("accuracy", "reward", "win_rate", "kl")
"""Metrics, or beginnings of their names, the one that tells most first."""


class EvaluateStage(Stage):
    """A stage that evaluates a policy. Its keys are those of an evaluation; with `tasks`, of `rlhf evaluate --tasks`.

    `compare` names an earlier evaluation, to which the differences are given. Without `reference`, a policy that a stage has
    trained is compared with the one that this stage began with.
    """

    model_keys = (MODEL, _REFERENCE, "baseline", COMPRESS, *_REWARDS)

    def _find_method(self) -> None:
        self.does_tasks = _TASKS in self.values
        self.makes = {} if self.does_tasks else {EVALUATION: Product(EVALUATION, ".")}
        if self.entry.method is not None:
            fix = "leave it out, or give the stage another `kind`"
            self.errors.append(ConfigError("an evaluation has no `method`", place=self.entry.place("method"), fix=fix))

    def _completed(self) -> dict[str, Any]:
        if self.does_tasks:
            return {"seed": self.recipe.recipe.seed, **self.values}
        values = {"seed": self.recipe.recipe.seed, **self.with_compression(self.values)}
        for key in _REWARDS:
            if values.get(key) is not None:
                given = values[key] if isinstance(values[key], list) else [values[key]]
                values[key] = [self.reward_by_stage(one) for one in given]
        if values.get(_COMPARE) in self.recipe.names:
            values[_COMPARE] = written(str(values[_COMPARE]), EVALUATION)
        if _REFERENCE not in values:
            made = list(references(values.get(MODEL)))
            maker = self.earlier.get(made[0].stage) if made else None
            if maker is not None and maker.takes_policy and maker.makes_policy and maker.input_models():
                values[_REFERENCE] = maker.input_models()[0]
        return values

    def _needs(self) -> Sequence[Need]:
        policies = [
            Need(key, (POLICY,), "a policy, which completes prompts") for key in (MODEL, _REFERENCE, "baseline")
        ]
        rewards = [need for key in _REWARDS for need in reward_needs(key, self.values.get(key))]
        return [
            *policies,
            *rewards,
            COMPRESSOR_NEED,
            Need(_COMPARE, (EVALUATION,), "an earlier stage of the kind `evaluate`"),
        ]

    def check(self, find: Find) -> list[RLHFError]:
        if self.does_tasks:
            return self._check_tasks(find)
        errors = self.compression_errors()
        values = self._file(find)
        if "output" in self.values:
            fix = "leave it out: a stage writes into the pipeline's directory"
            errors.append(ConfigError("a stage has no `output`", place=self.entry.place("output"), fix=fix))
        for key in [key for key in values if key not in EvaluationRunConfig.model_fields]:
            try:
                refuse_unknown({key: None}, EvaluationRunConfig, "evaluate", self.entry.places, (_COMPARE,))
            except ConfigError as error:
                errors.append(error)
            values.pop(key)
        try:
            load_evaluation_run(GivenValues(values, self.entry.places))
        except RLHFError as error:
            errors += every_error(error)
        errors += check_prompts(self.values, self.entry.place("prompts"))
        return [*errors, *self._compare_errors(), *self._model_errors(MODEL, _REFERENCE, "baseline")]

    def _compare_errors(self) -> list[RLHFError]:
        """Return what is wrong with the evaluation that `compare` names by its path, or by what may be a stage's name."""
        given = self.values.get(_COMPARE)
        if given is None or list(references(given)):  # a reference is checked as one
            return []
        try:
            EvaluationReport.load(str(given))
        except RLHFError as error:
            if near := nearest(str(given), self.earlier):
                problem = f"names the stage `{given}`, and no earlier stage has that name"
                return [ConfigError(problem, place=self.entry.place(_COMPARE), fix=f"did you mean `{near}`?")]
            fix = "name an earlier stage of the kind `evaluate`, or the directory of an evaluation"
            return [type(error)(error.problem, place=f"{self.entry.place(_COMPARE)}: {given}", got=error.got, fix=fix)]
        return []

    def _model_errors(self, *keys: str) -> list[RLHFError]:
        """Return what is wrong with the models that these keys of the recipe name."""
        given = {key: self.values.get(key) for key in keys if key in self.entry.values}
        named = {
            key: source for key, source in given.items() if isinstance(source, str) and not list(references(source))
        }
        return [
            error for key, source in named.items() for error in check_model(source, self.entry.place(key), self.earlier)
        ]

    def _check_tasks(self, find: Find) -> list[RLHFError]:
        """Return what is wrong with a stage of lm-eval's tasks."""
        errors: list[RLHFError] = []
        for key in (_COMPARE, "output"):
            if key in self.values:
                problem = f"a stage of lm-eval's tasks has no `{key}`"
                errors.append(ConfigError(problem, place=self.entry.place(key), fix="leave it out"))
        for key in _OF_PROMPTS & self.values.keys():
            problem = f"`{key}` isn't for tasks of lm-eval, which have prompts and metrics of their own"
            fix = "leave it out, or evaluate prompts in a stage without `tasks`"
            errors.append(ConfigError(problem, place=self.entry.place(key), fix=fix))
        values = {key: value for key, value in self._file(find).items() if key not in _OF_PROMPTS}
        run, wrong, found = LmEvalRunConfig.parse_sound(values, place=self.entry.places, instead={_TASKS: ["tasks"]})
        errors += found
        if run is not None and _TASKS not in wrong:
            with Mistakes().noted() as tasks:
                find_tasks(run.tasks, run.include_path)
            errors += [placed(one, self.entry.place(_TASKS)) for one in tasks]
        return [*errors, *self._model_errors(MODEL)]

    def run(self, work: StageWork) -> dict[str, Any]:
        replace_file(work.file, dump_yaml({**self._file(work.find), "output": str(work.directory)}).encode())
        if self.does_tasks:
            # What was killed is done again: lm-eval asks for all of a task at once.
            text = work.run(["evaluate", str(work.file), "--json", "--overwrite"], log=work.file.with_suffix(".log"))
            report = json.loads(text)
            metrics = {
                f"{task}/{name}": one
                for task, score in report[_TASKS].items()
                for name, one in score["metrics"].items()
            }
            return {"metrics": metrics, "options": report["options"], "seconds": report["seconds"]}
        rows = work.directory / COMPLETIONS_FILE
        more = ["--resume"] if rows.exists() and rows.stat().st_size else []
        if before := self.values.get(_COMPARE):
            more += ["--compare", str(resolved(before, work.find))]
        found = work.run(["evaluate", str(work.file), "--json", *more], log=work.file.with_suffix(".log"))
        return dict(json.loads(found))

    def gain(self, metrics: Mapping[str, Any]) -> str:
        found, changes = metrics.get("metrics", {}), metrics.get("differences", {})
        names = [name for start in _TELLING for name in found if name.startswith(start)][:1] or list(found)[:1]
        texts = [f"{name} {_shown(found[name])}" for name in names]
        earlier = "".join(one.stage for one in references(self.values.get(_COMPARE)))
        return ", ".join(
            texts + [f"{_shown(changes[name], '+')} against {earlier}" for name in names if name in changes]
        )

    def _file(self, find: Find) -> dict[str, Any]:
        """Return the evaluation's configuration file, as values."""
        return {key: value for key, value in resolved(self.values, find).items() if key not in ("output", _COMPARE)}


def _shown(estimate: Mapping[str, Any], sign: str = "") -> str:
    """Return an estimate with its standard error."""
    error = estimate.get("error")
    return f"{estimate['value']:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
