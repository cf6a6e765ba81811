"""An evaluation as it was asked for on the command line or in a file, made into a checked configuration and an evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.evaluation import EvaluationConfig, EvaluationMetric, EvaluationRunConfig
from rlhf_core.config.file_paths import find_beside
from rlhf_core.config.flags import convert, lex, spread
from rlhf_core.config.training import ModelConfig
from rlhf_core.config.yaml_file import load_yaml, nest, overlay
from rlhf_core.data.open_source import check_paths
from rlhf_core.data.prompt_rows import PromptRow
from rlhf_core.evaluation.evaluator import RLHFEvaluator, chosen_metrics
from rlhf_core.generation.sampler_models import reward_by_path
from rlhf_core.generation.sampling_job import PolicyPreparation, read_run_prompts
from rlhf_core.infra.errors import ConfigError, Mistakes
from rlhf_core.registry.method_or_file import GivenValues
from rlhf_core.rewards import check_given

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel


def load_evaluation_run(file: str | Path | GivenValues | None, flags: Sequence[str] = ()) -> EvaluationRunConfig:
    """Return the options of an evaluation from a file or from values that were read, and flags; its rewards are found.

    Raises:
        ConfigError: an unknown option (with the nearest), a missing or wrong one, a reward that doesn't exist, or a metric that
            lacks what it needs.
        PluginError: a reward is broken.
        DataError: a file of preferences doesn't exist.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {"": "command line"}
    if isinstance(file, GivenValues):
        values, places = dict(file.values), dict(file.places)
    elif file is not None:
        values, places = load_yaml(file)
        values = find_beside(values, file)
    given = lex(flags)
    prompts = [flag.text for flag in given if flag.key == "prompts" and flag.text is not None]
    rest = [flag for flag in given if flag.key != "prompts" or flag.text is None]
    over, over_places = convert(rest, EvaluationRunConfig, owner="evaluate")
    values = overlay(spread(values, EvaluationRunConfig), nest(spread(over, EvaluationRunConfig)))
    places |= over_places
    if prompts:  # kept as typed: a prompt may look like YAML
        values["prompts"], places["prompts"] = prompts, "--prompts"
    mistakes = Mistakes(
        ConfigError(f"`{key}` is missing", place=places[""], fix=f"give `--{key} {what}`, or `{key}:` in a file")
        for key, what in (("model", "PATH"), ("prompts", "FILE|TEXT"))
        if values.get(key) is None
    )
    instead = {"model": "model", "prompts": ["prompts"]}
    whole = instead | {key: value for key, value in values.items() if key not in instead or value is not None}
    run, _, found = EvaluationRunConfig.parse_sound(whole, place=places, instead=instead)
    mistakes += found
    if run is not None:
        for name in ("reward", "validator"):
            at = {"": places.get(name, f"--{name}")} | {
                f"rewards{key.removeprefix(name)}": place for key, place in places.items() if key.startswith(f"{name}.")
            }
            with mistakes.noted():
                check_given([reward_by_path(one) for one in getattr(run, name)], place=at)
        with mistakes.noted():
            check_paths(run.preferences or [])
    mistakes.raise_first()
    assert run is not None
    metrics_of(run)
    return run


def metrics_of(run: EvaluationRunConfig) -> list[EvaluationMetric]:
    """Return what an evaluation will measure. Raises ConfigError where a metric lacks what it needs."""
    return chosen_metrics(
        run,
        rewards=bool(run.reward),
        validators=bool(run.validator),
        judge=run.judge is not None,
        reference=run.reference is not None,
        compared=run.baseline is not None or run.baseline_column is not None,
        embedder=run.embeddings is not None,
        preferences=bool(run.preferences),
    )


def models_of(run: EvaluationRunConfig) -> Mapping[str, ModelConfig]:
    """Return the policies to load by role: those that what is measured needs."""
    measured = metrics_of(run)
    given = {
        "policy": run.model,
        "reference": run.reference if "kl" in measured else None,
        "baseline": run.baseline if "win_rate" in measured else None,
    }
    return {role: model for role, model in given.items() if model is not None}


def open_evaluator(
    run: EvaluationRunConfig, load: Callable[[ModelConfig], PolicyModel], *, prompts: Sequence[PromptRow] | None = None
) -> RLHFEvaluator:
    """Return the evaluator that a run describes, with its models loaded and its prompts read.

    Args:
        load: returns a policy; a model that has two roles is loaded once.
        prompts: the run's, where they were read before.

    Raises:
        ConfigError, ModelError: as `RLHFEvaluator`.
        DataError: as `read_run_prompts`.
    """
    rows = read_run_prompts(run) if prompts is None else prompts
    loaded: dict[str, PolicyModel] = {}
    prepared = PolicyPreparation(run)
    models: dict[str, PolicyModel] = {}
    for role, model in models_of(run).items():
        key = model.model_dump_json()
        if key not in loaded:
            loaded[key] = prepared(load(model))
        models[role] = loaded[key]
    policy = models.pop("policy")
    compares, embeds = "win_rate" in metrics_of(run), "embedding_distance" in metrics_of(run)
    return RLHFEvaluator(
        policy,
        prompts=rows,
        **models,
        baseline_column=run.baseline_column if compares else None,
        rewards=list(run.reward),
        validators=list(run.validator),
        judge=run.judge if compares else None,
        embedder=run.embeddings if embeds else None,
        preferences=run.preferences or None,
        config=EvaluationConfig.parse({name: getattr(run, name) for name in EvaluationConfig.model_fields}),
    )
