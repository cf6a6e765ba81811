"""Rough estimates of the memory and time of a recipe's stages, from parameters and tokens, before anything runs.

Those of a training are `training.cost_estimate`'s. Memory of sampling: the weights, and keys and values.
Tokens are the texts' bytes divided by 4, and half of what a completion may have. Each process of a stage takes a few seconds for
its imports, which is most of a tiny stage's time. An estimate can be off by a factor of three.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_core.config.improvement_round import ImprovementConfig
from rlhf_core.data.open_source import data_entries, open_source
from rlhf_core.infra.errors import RLHFError
from rlhf_core.pipeline.evaluate_stage import EvaluateStage
from rlhf_core.pipeline.improve_stage import ImproveStage
from rlhf_core.pipeline.merge_stage import MergeStage
from rlhf_core.pipeline.pipeline_plan import PipelinePlan
from rlhf_core.pipeline.stage import Stage
from rlhf_core.pipeline.stage_references import references
from rlhf_core.pipeline.train_stage import TrainStage
from rlhf_core.training.cost_estimate import (
    BYTES_PER_TOKEN,
    GENERATION_SPEED,
    TRAINING_SPEED,
    ModelSize,
    RunCost,
    measured_speed,
    model_size,
    training_cost,
)

_SEEN = 50
"""Rows of a file from which the length of all is estimated."""
_START = 4.0
"""Seconds of a process for imports and its model: 2.5 to 4.7 on two cores of an Intel Xeon."""


def stage_costs(plan: PipelinePlan) -> list[RunCost]:
    """Return an estimate for each stage of a checked plan."""
    found = []
    for stage in plan.stages.values():
        cost = _cost(plan, stage)
        seconds = None if cost.seconds is None else cost.seconds + _START * _processes(plan, stage)
        found.append(RunCost(cost.memory, seconds))
    return found


def _processes(plan: PipelinePlan, stage: Stage) -> int:
    """Return how many processes a stage starts one after the other, the capability tests of what it makes included."""
    tests = plan.recipe.recipe.capabilities is not None and stage.makes_policy
    # A round of improvement samples, scores and trains.
    return (3 * int(stage.values.get("rounds", 1)) if isinstance(stage, ImproveStage) else 1) + tests


def _cost(plan: PipelinePlan, stage: Stage) -> RunCost:
    size = _size_in(plan, stage)
    if size is None:
        return RunCost()
    if isinstance(stage, TrainStage):
        try:
            job = stage.job(plan.find)
        except RLHFError:
            return RunCost()
        rows, tokens = _rows_and_tokens(stage.values.get("data"))
        return training_cost(size, job.options, {**job.method.roles}, rows=rows, prompt_tokens=tokens)
    if isinstance(stage, ImproveStage):
        return _improving(size, ImprovementConfig.model_validate(stage.values))
    if isinstance(stage, MergeStage):  # tensor by tensor, at the speed of the disk
        return RunCost()
    completions = 4 if isinstance(stage, EvaluateStage) else 1
    return RunCost(_generation_memory(size, 64, 1024), _generating(size, {"n": completions, **stage.values}))


def _generating(size: ModelSize, values: Mapping[str, Any]) -> float | None:
    """Return the seconds of drawing a stage's completions, a tree search's steps aside; None where the prompts aren't known."""
    if values.get("prompts") is None or (rows := _rows_and_tokens(values["prompts"])[0]) is None:
        return None
    rows = min(rows, values.get("limit") or rows)
    samplers = values.get("samplers") or [values]
    written = sum(
        (one.get("max_new_tokens") or 256) / 2 * (one.get("candidates") or one.get("n") or values["n"] or 1)
        for one in samplers
        if isinstance(one, Mapping)
    )
    return 2.0 * size.parameters * rows * written / (GENERATION_SPEED * measured_speed(str(values.get("precision"))))


def _improving(size: ModelSize, config: ImprovementConfig) -> RunCost:
    """Return the cost of rounds of sampling and training; what is trained on isn't known, so it counts as `keep` per prompt."""
    rows, prompt_tokens = _rows_and_tokens(config.prompts)
    written = config.sampler.get("max_new_tokens", 256) / 2
    count = config.sampler.get("n", 8)
    rows = min(rows, config.sampler.get("limit") or rows) if rows is not None else None
    if rows is None or not isinstance(count, int):
        return RunCost(16.0 * size.parameters)
    sampled = 2 * size.parameters * rows * count * written / (GENERATION_SPEED * measured_speed())
    trained = 6 * size.parameters * rows * min(config.keep, count) * (prompt_tokens + written)
    return RunCost(16.0 * size.parameters, config.rounds * (sampled + trained / (TRAINING_SPEED * measured_speed())))


def _generation_memory(size: ModelSize, rows: int, tokens: int) -> float:
    return 4.0 * size.parameters + 8.0 * rows * tokens * size.layers * size.width


def _size_in(plan: PipelinePlan, stage: Stage) -> ModelSize | None:
    """Return the size of the model that a stage begins with, followed back to one that is on the disk."""
    for source in stage.input_models():
        named = list(references(source))
        if named and named[0].stage in plan.stages:
            return _size_in(plan, plan.stages[named[0].stage])
        return model_size(source)
    return None


def _rows_and_tokens(data: Any) -> tuple[int | None, float]:
    """Return how many rows some data have, where counting them is cheap, and the tokens of one."""
    texts: list[int] = []
    total: float | None = 0.0
    try:
        for entry in (data_entries(data) or []) if not list(references(data)) else []:
            file = Path(entry.path).expanduser()
            if not file.is_file():
                total = None
                continue
            lengths = [len(json.dumps(row.values, default=str)) for row in islice(open_source(str(file)).rows(), _SEEN)]
            texts += lengths
            if total is not None and lengths:
                # Compressed files and tables hold fewer bytes than their rows have as JSON.
                whole = len(lengths) < _SEEN
                held = len(lengths) if whole else file.stat().st_size * len(lengths) / sum(lengths)
                total += entry.rows or entry.weight * held
    except RLHFError:
        return None, 256.0
    if not texts:
        return None, 256.0
    return None if total is None else round(total), sum(texts) / len(texts) / BYTES_PER_TOKEN
