"""`RLHFEvaluator`: one generation of completions per prompt, measured in every way that there is something to measure with."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_core.config.evaluation import METRICS, EvaluationConfig, EvaluationMetric, PairwiseJudgeConfig
from rlhf_core.data.prompt_rows import PromptRow, read_prompts
from rlhf_core.data.row_output import RowOutput, RowOutputKind
from rlhf_core.evaluation import measures
from rlhf_core.evaluation.calibration import reliability
from rlhf_core.evaluation.estimate import Estimate
from rlhf_core.evaluation.evaluation_report import EvaluationReport, MetricByPrompt
from rlhf_core.evaluation.evaluation_run import EvaluationRun, MeasuredWith
from rlhf_core.evaluation.measures import PromptMeasures
from rlhf_core.evaluation.pairwise_judge import PairwiseJudge
from rlhf_core.evaluation.text_embeddings import TextEmbedder
from rlhf_core.generation.sample_file import changed_inputs, open_sample_file
from rlhf_core.generation.sampled_rows import input_columns, refuse_taken
from rlhf_core.generation.sampler_models import load_policy, reward_by_path
from rlhf_core.generation.sampling_job import compression_record, prompts_record
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.python_wording import said_for_python
from rlhf_core.infra.redact import redact
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.infra.version import __version__
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.models.same_vocabulary import check_same_vocabulary
from rlhf_core.rewards import RewardLike, check_given, open_rewards

COMPLETIONS_FILE = "completions.jsonl"
EVALUATED = RowOutputKind(".run.json", "what its rows were evaluated by", "options, models or prompts", changed_inputs)
"""Files of completions with what was measured of them."""
_ADDED = {"completions", "stop_reasons", "tokens", "rewards", "baseline_completions", "baseline_rewards", "measures"}
"""Columns that a row gets."""
_AGGREGATED = {"metrics", "bins", "resamples", "batch_size"}
"""Options that don't change what is measured of a prompt."""


class RLHFEvaluator:
    """Measures a policy on prompts: rewards, verified accuracy, calibration, diversity, KL to a reference, win rates.

    Each prompt is completed once, n times, and all metrics read the same completions. Memory holds the completions of one batch
    of prompts and the measured numbers of all. The same seed gives the same completions, whatever the batch size.

        evaluator = RLHFEvaluator(policy, reference="base", validators=["numeric_answer"], n=8)
        evaluator.add_prompts("test.jsonl")
        report = evaluator.evaluate("results/")
        print(report["pass@8/numeric_answer"])

    Args:
        policy: a `PolicyModel`, or the path of one.
        prompts: as `add_prompts` takes them.
        reference: policy of the same tokenizer that the KL is measured to.
        baseline: policy whose completions are compared with.
        baseline_column: column of the prompts' rows with a given response that is compared with, instead.
        rewards: rewards in any accepted form, whose means are reported.
        validators: rewards that tell right completions (at least `right_from`) from wrong ones.
        judge: what compares completions with the baseline's: a `PairwiseJudge`, its options, or a model's name.
        embedder: what embeds texts, for distances: a function from N texts to (N, D), or a model's path.
        preferences: rows of prompts with a chosen and a rejected response, on which rewards are checked.
        config: the options; or give them by name.

    Raises:
        ConfigError: an option or a reward doesn't exist, or a name is a reward's and a validator's.
        ModelError: a model can't be loaded, or has another vocabulary than the policy.
    """

    def __init__(
        self,
        policy: PolicyModel | str | Path,
        *,
        prompts: Any = None,
        reference: PolicyModel | str | Path | None = None,
        baseline: PolicyModel | str | Path | None = None,
        baseline_column: str | None = None,
        rewards: Sequence[RewardLike] | RewardLike = (),
        validators: Sequence[RewardLike] | RewardLike = (),
        judge: PairwiseJudge | PairwiseJudgeConfig | Mapping[str, Any] | str | None = None,
        embedder: Callable[[Sequence[str]], Tensor] | str | None = None,
        preferences: Any = None,
        config: EvaluationConfig | None = None,
        **options: Any,
    ) -> None:
        self.config = EvaluationConfig.given(config, options, place="RLHFEvaluator")
        if baseline is not None and baseline_column is not None:
            problem = "completions are compared either with a baseline or with a column"
            raise ConfigError(problem, place="RLHFEvaluator(baseline_column=…)", fix="leave one of them out")
        self.policy = _policy(policy, "policy")
        self.reference = None if reference is None else _policy(reference, "reference")
        self.baseline = None if baseline is None else _policy(baseline, "baseline")
        if self.reference is not None:
            check_same_vocabulary("reference", self.reference, self.policy, main_is="the policy")
            if self.policy.prompt_compression is not None:  # it meets the prompts as the policy reads them
                self.policy.prompt_compression.attach(self.reference)
        self.baseline_column = baseline_column
        self.judge = _judge(judge)
        self.embedder = TextEmbedder(embedder) if isinstance(embedder, str) else embedder
        self.preferences = preferences
        self._rewards = _several(rewards)
        check_given(self._rewards)
        self._validators: list[RewardLike] = []
        for validator in _several(validators):
            self.add_validator(validator)
        self.prompts: list[PromptRow] = []
        if prompts is not None:
            self.add_prompts(prompts)

    def add_prompts(
        self, prompts: Any, *, columns: Mapping[str, str] | None = None, limit: int | None = None, split: str = "train"
    ) -> None:
        """Add prompts, in any form that `read_prompts` takes: texts, chats, rows, files of rows. Columns reach the rewards.

        Args:
            columns: `prompt` → the data's own name for it. limit: most rows of each file. split: of a hub dataset.

        Raises:
            DataError: a file can't be read, or a row has no prompt, or a column that an evaluation adds.
            ConfigError: it is none of these forms, or is empty.
        """
        rows = _are_rows(prompts)
        given = prompts[:limit] if rows else read_prompts(prompts, columns=columns, limit=limit, split=split)
        for row in given:
            refuse_taken(row, _ADDED)
            self.prompts.append(row)

    def add_validator(self, validator: RewardLike) -> None:
        """Add what tells right completions from wrong ones: a reward in any accepted form, whose scores are 1 and 0.

        Raises:
            ConfigError: there is no such reward (the message has the nearest), or it has no such option.
            PluginError: a plugin is broken.
        """
        check_given([validator], place="validators")
        self._validators.append(validator)

    # What is measured

    def metrics(self) -> list[EvaluationMetric]:
        """Return what will be measured: the metrics that were asked for, or all for which there is what they need.

        Raises:
            ConfigError: one was asked for that lacks what it needs.
        """
        return chosen_metrics(
            self.config,
            rewards=bool(self._rewards),
            validators=bool(self._validators),
            judge=self.judge is not None,
            reference=self.reference is not None,
            compared=self.baseline is not None or self.baseline_column is not None,
            embedder=self.embedder is not None,
            preferences=bool(self.preferences),
        )

    # The run

    @said_for_python()
    def open_output(self, directory: str | Path, *, resume: bool = False, overwrite: bool = False) -> RowOutput:
        """Lock the file of completions in a directory and make it ready; `evaluate` appends to it, and a resume continues it.

        Raises:
            ConfigError: it was begun with other options, models, rewards or prompts; the difference is shown.
            StorageError: it exists and is neither to be continued nor replaced, can't be written, or is in use.
        """
        path = Path(directory).expanduser() / COMPLETIONS_FILE
        EVALUATED.check_output(path, resume=resume, overwrite=overwrite)
        columns = [input_columns(row) for row in self.prompts]
        return open_sample_file(path, self._record(), columns, resume=resume, overwrite=overwrite, kind=EVALUATED)

    @said_for_python()
    def evaluate(
        self,
        output: str | Path | RowOutput | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationReport:
        """Complete all prompts, measure the completions, and return the report.

        Args:
            output: directory that gets `evaluation.json` and `completions.jsonl`, or a file from `open_output`; None keeps no
                completions.
            resume: continue what an interrupted evaluation has written there. overwrite: replace it.
            progress: called after each prompt with how many are done, and the tokens of its completions.

        Raises:
            ConfigError: there are no prompts, or a metric was asked for that lacks what it needs.
            DataError: a prompt can't be completed, or a row lacks what a reward or the judge reads.
            PluginError: a reward or the judge fails.
            NumbersError: the KL is infinite.
            StorageError: the output can't be written.
        """
        if not self.prompts:
            raise ConfigError("there are no prompts", place="RLHFEvaluator", fix="`add_prompts(…)`")
        chosen = self.metrics()
        if output is None:
            return self._evaluated(None, chosen, progress)
        opened = (
            contextlib.nullcontext(output)
            if isinstance(output, RowOutput)
            else self.open_output(output, resume=resume, overwrite=overwrite)
        )
        with opened as file:
            report = self._evaluated(file, chosen, progress)
            report.save(file.path.parent)
        return report

    def _evaluated(
        self, file: RowOutput | None, chosen: Sequence[EvaluationMetric], progress: Callable[[int, int], None] | None
    ) -> EvaluationReport:
        began = time.monotonic()
        run = EvaluationRun(self._given(), self.prompts, self.config, chosen, self._together())
        measured = [] if file is None else [_measures_in(place, row) for place, row in file.rows()]
        for answered in run.answered(len(measured)):
            found = run.measure(answered)
            if file is not None:
                file.append(*(row for row, _ in found))
                file.note()
            for one, (_, own) in zip(answered, found, strict=True):
                measured.append(own)
                if progress is not None:
                    progress(len(measured), sum(len(each.ids) for each in one.own))
        accuracies = run.reward_accuracies()
        if file is not None:
            file.note(status="done")
        # A file's record has it already: weights are hashed once.
        about = self._about() if file is None else {name: file.record[name] for name in ("models", "rewards")}
        settings = {"options": self._options(), **about, "metrics": list(chosen), "version": __version__}
        return self._report(measured, accuracies, settings, time.monotonic() - began)

    def _report(
        self,
        measured: Sequence[PromptMeasures],
        accuracies: Mapping[str, Estimate],
        settings: Mapping[str, Any],
        seconds: float,
    ) -> EvaluationReport:
        """Return the report of what was measured of all prompts."""
        config = self.config
        found, notes = measures.estimates(
            measured, bins=config.bins, resamples=config.resamples, seed=stream_seed(config.seed, "bootstrap")
        )
        if "kl" in settings["metrics"] and not config.draws_from_policy:
            notes.append(
                "the KL is that of the models' own distributions along completions that were drawn from a changed one"
                " (temperature, truncation or penalty): its sum over a completion doesn't estimate the KL of whole completions"
            )
        return EvaluationReport(
            metrics=found | dict(accuracies),
            by_prompt=_by_prompt(measured),
            prompts=[{"place": row.place, "key": _prompt_key(row)} for row in self.prompts],
            reliability={
                name.partition("/")[2]: [
                    dataclasses.asdict(one) for one in reliability(*_columns(measured, name), config.bins)
                ]
                for name in dict.fromkeys(name for one in measured for name in one.points)
                if name.startswith(f"{measures.CALIBRATION}/")
            },
            settings=settings,
            notes=notes,
            seconds=seconds,
        )

    def _options(self) -> dict[str, Any]:
        return redact(self.config.model_dump(mode="json") | {"baseline_column": self.baseline_column})

    def _about(self) -> dict[str, Any]:
        """Return models, with the hashes of their weights, and rewards as JSON values, secrets redacted."""
        models = {"policy": self.policy, "reference": self.reference, "baseline": self.baseline}
        about = {
            "models": {
                name: one.describe() | {"precision": str(one.precision)}
                for name, one in models.items()
                if one is not None
            },
            "rewards": {
                "rewards": open_rewards(self._rewards).describe() if self._rewards else {},
                "validators": open_rewards(self._validators).describe() if self._validators else {},
                "judge": None if self.judge is None else self.judge.describe(),
                "embedder": self.embedder.describe() if isinstance(self.embedder, TextEmbedder) else None,
            },
        }
        return redact(about)

    def _record(self) -> dict[str, Any]:
        """Return what determines the rows of the output."""
        options = {name: value for name, value in self._options().items() if name not in _AGGREGATED}
        # What a row holds depends on what was measured, and its last bits on which prompts were completed together.
        return self._about() | {
            "options": options | {"metrics": self.metrics(), "batch_size": self._together()},
            "prompts": prompts_record(self.prompts),
            **compression_record([self.policy]),
        }

    def _given(self) -> MeasuredWith:
        return MeasuredWith(
            policy=self.policy,
            reference=self.reference,
            baseline=self.baseline,
            baseline_column=self.baseline_column,
            rewards=self._rewards,
            validators=self._validators,
            judge=self.judge,
            embedder=self.embedder,
            preferences=self.preferences,
        )

    def _together(self) -> int:
        return self.config.rows_together(self.policy.device.type)


def chosen_metrics(
    config: EvaluationConfig,
    *,
    rewards: bool,
    validators: bool,
    judge: bool,
    reference: bool,
    compared: bool,
    embedder: bool,
    preferences: bool,
) -> list[EvaluationMetric]:
    """Return what is measured: the metrics that were asked for, or all for which there is what they need.

    Args:
        compared: whether there is a baseline, or a column of given responses. The others: whether there is such a thing.

    Raises:
        ConfigError: a metric was asked for that lacks what it needs.
    """
    several = "" if config.completions > 1 else "it needs several completions per prompt, and `n` is 1"
    by = "" if rewards or validators or judge else "there is no reward, validator or judge to compare by"
    no_rewards, no_validators = (
        "" if rewards else "there are no rewards",
        "" if validators else "there are no validators",
    )
    missing: dict[EvaluationMetric, str] = {
        "reward": no_rewards,
        "reward_accuracy": no_rewards or ("" if preferences else "there are no rows of preferences"),
        "accuracy": no_validators,
        "calibration": no_validators or (several if config.confidence == "vote_share" else ""),
        "diversity": several,
        "embedding_distance": several or ("" if embedder else "there is no model that embeds texts"),
        "kl": "" if reference else "there is no reference",
        "win_rate": by if compared else "there is no baseline",
    }
    for name in config.metrics or ():
        if why := missing.get(name):
            raise ConfigError(f"`{name}` can't be measured: {why}", place="metrics", fix="give it, or leave it out")
    return [name for name in METRICS if not missing.get(name) and name in (config.metrics or METRICS)]


def _measures_in(place: str, row: Mapping[str, Any] | None) -> PromptMeasures:
    """Return what was measured of a prompt by the evaluation that wrote its row."""
    try:
        return PromptMeasures.from_json((row or {})["measures"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fix = "restore the file as it was written, or `--overwrite` replaces it"
        raise StorageError("the row has no measures that can be read", place=place, fix=fix) from error


def _by_prompt(measured: Sequence[PromptMeasures]) -> dict[str, MetricByPrompt]:
    """Return each metric's values and weights, one per prompt."""
    found = {}
    for name in measures.metric_names(measured):
        of = [one.values.get(name) for one in measured]
        weighted = any(one is not None and one.weight != 1 for one in of)
        found[name] = MetricByPrompt(
            [None if one is None else one.value for one in of],
            [0.0 if one is None else one.weight for one in of] if weighted else None,
        )
    return found


def _columns(measured: Sequence[PromptMeasures], name: str) -> tuple[list[float], list[float]]:
    points = [point for one in measured for point in one.points.get(name, ())]
    return [x for x, _ in points], [y for _, y in points]


def _prompt_key(row: PromptRow) -> str:
    """Return a hash of a prompt, by which evaluations find it again."""
    return hashlib.sha256(json.dumps([row.prompt, row.tools], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _policy(given: PolicyModel | str | Path, role: str) -> PolicyModel:
    if isinstance(given, PolicyModel):
        return given
    return load_policy(given, role, place=f"RLHFEvaluator({role}=…)")


def _judge(given: PairwiseJudge | PairwiseJudgeConfig | Mapping[str, Any] | str | None) -> PairwiseJudge | None:
    if given is None or isinstance(given, PairwiseJudge):
        return given
    if isinstance(given, PairwiseJudgeConfig):
        return PairwiseJudge(given)
    values = {"model": given} if isinstance(given, str) else given
    return PairwiseJudge(PairwiseJudgeConfig.parse(values, place="RLHFEvaluator(judge=…)"))


def _several(given: Any) -> list[RewardLike]:
    """Return one reward or several as a list; one named by a model's path as the reward that reads it."""
    alone = isinstance(given, str | Mapping) or not isinstance(given, Sequence) or _is_weighted(given)
    return [_by_path(one) for one in ([given] if alone else given)]


def _is_weighted(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float)


def _by_path(given: Any) -> RewardLike:
    from rlhf_core.config.online import RewardConfig

    if isinstance(given, str) and Path(given).expanduser().is_dir():
        given = RewardConfig(name=given)
    return reward_by_path(given) if isinstance(given, RewardConfig) else given


def _are_rows(prompts: Any) -> bool:
    return isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(one, PromptRow) for one in prompts)
