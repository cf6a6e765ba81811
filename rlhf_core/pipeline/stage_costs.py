"""Rough estimates of the memory and time of a recipe's stages, from parameters and tokens, before anything runs.

Memory of a training: 16 bytes for each trained parameter (float32 weights, gradients and Adam's two moments), the bytes of frozen
models, and activations of one micro-batch: 34 bytes per token, layer and unit of width at 16 bits (Korthikanti et al. 2022, arXiv
2205.05198, without attention's scores), twice that in float32, and the logits. Of sampling: the weights, and keys and values.

Time: 6 operations per trained parameter and token, 2 per parameter and token that is only read, at the speed of this machine's
matrix products in the stage's precision, which are measured for an instant; half of that speed is reached in training, a
quarter in generation, of many rows at once.
Tokens are the texts' bytes divided by 4, and half of what a completion may have. An estimate can be off by a factor of three.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_core.config.improvement_round import ImprovementConfig
from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import TrainerConfig
from rlhf_core.data.open_source import data_files, open_source
from rlhf_core.infra.errors import RLHFError
from rlhf_core.infra.files import readable_size
from rlhf_core.infra.model_files import adapter_chain, is_adapter
from rlhf_core.infra.safetensors_file import read_header
from rlhf_core.pipeline.evaluate_stage import EvaluateStage
from rlhf_core.pipeline.improve_stage import ImproveStage
from rlhf_core.pipeline.merge_stage import MergeStage
from rlhf_core.pipeline.pipeline_plan import PipelinePlan
from rlhf_core.pipeline.stage import Stage
from rlhf_core.pipeline.stage_references import references
from rlhf_core.pipeline.train_stage import TrainStage

BYTES_PER_TOKEN = 4
"""Bytes of text for one token, as of English with a usual vocabulary."""
_TRAINING, _GENERATION = 0.5, 0.25
"""Shares of the measured speed that are reached."""
_SEEN = 50
"""Rows of a file from which the length of all is estimated."""


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that costs follow from."""

    parameters: int
    layers: int
    width: int
    vocabulary: int


@dataclass(frozen=True)
class StageCost:
    """What a stage takes; None for what can't be known yet."""

    memory: float | None = None
    """Bytes, of the device that it runs on."""
    seconds: float | None = None

    def cells(self) -> tuple[str, str]:
        """Return both as a table shows them."""
        memory = "?" if self.memory is None else f"~{readable_size(self.memory)}"
        return memory, "?" if self.seconds is None else f"~{_readable_time(self.seconds)}"

    def as_dict(self) -> dict[str, float | None]:
        """Return JSON values."""
        return {"memory_bytes": self.memory, "seconds": self.seconds}


def stage_costs(plan: PipelinePlan) -> list[StageCost]:
    """Return an estimate for each stage of a checked plan."""
    return [_cost(plan, stage) for stage in plan.stages.values()]


def _cost(plan: PipelinePlan, stage: Stage) -> StageCost:
    size = _size_in(plan, stage)
    if size is None:
        return StageCost()
    if isinstance(stage, TrainStage):
        try:
            job = stage.job(plan.find)
        except RLHFError:
            return StageCost()
        return _training(size, job.options, {**job.method.roles}, stage.values.get("data"))
    if isinstance(stage, ImproveStage):
        return _improving(size, ImprovementConfig.model_validate(stage.values))
    if isinstance(stage, MergeStage):  # tensor by tensor, at the speed of the disk
        return StageCost()
    completions = 4 if isinstance(stage, EvaluateStage) else 1
    return StageCost(_generation_memory(size, 64, 1024), _generating(size, {"n": completions, **stage.values}))


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
    return 2.0 * size.parameters * rows * written / (_GENERATION * measured_speed(str(values.get("precision"))))


def _training(size: ModelSize, options: TrainerConfig, roles: Mapping[str, Any], data: Any) -> StageCost:
    """Return the cost of a training run."""
    rows, prompt_tokens = _rows_and_tokens(data)
    online = options if isinstance(options, OnlineConfig) else None
    responses = online.group_size if online is not None else 1
    written = online.generation.max_new_tokens / 2 if online is not None else 0.0
    tokens = min(prompt_tokens + written, options.max_length or 1024)
    precise = 4 if options.precision == "float32" else 2
    adapter = 0 if options.lora is None else 16 * size.layers * size.width * options.lora.rank
    trained = sum(getattr(role, "trained", False) for role in roles.values())
    memory = 16.0 * (adapter or size.parameters) * trained + (precise * size.parameters if adapter else 0)
    if "reference" in roles and not adapter:
        memory += precise * size.parameters
    at_once = tokens * (options.micro_batch_size or options.batch_size * responses)
    if isinstance(options.batching.micro_batch_tokens, int):
        at_once = min(at_once, options.batching.micro_batch_tokens)
    memory += at_once * (17 * precise * size.layers * size.width + 8 * size.vocabulary)
    steps = options.max_steps
    if steps is None:
        if rows is None:
            return StageCost(memory)
        steps = max(1, round(rows * (options.epochs or 1) / options.batch_size))
    sequences = steps * options.batch_size * responses
    passes = (online.rollout_epochs if online is not None else 1) * trained
    operations = size.parameters * sequences * tokens * (6 * passes + 2 * (len(roles) - trained))
    speed = measured_speed(options.precision)
    seconds = operations / (_TRAINING * speed)
    seconds += 2 * size.parameters * sequences * written / (_GENERATION * speed)
    return StageCost(memory, seconds)


def _improving(size: ModelSize, config: ImprovementConfig) -> StageCost:
    """Return the cost of rounds of sampling and training; what is trained on isn't known, so it counts as `keep` per prompt."""
    rows, prompt_tokens = _rows_and_tokens(config.prompts)
    written = config.sampler.get("max_new_tokens", 256) / 2
    count = config.sampler.get("n", 8)
    rows = min(rows, config.sampler.get("limit") or rows) if rows is not None else None
    if rows is None or not isinstance(count, int):
        return StageCost(16.0 * size.parameters)
    sampled = 2 * size.parameters * rows * count * written / (_GENERATION * measured_speed())
    trained = 6 * size.parameters * rows * min(config.keep, count) * (prompt_tokens + written)
    return StageCost(16.0 * size.parameters, config.rounds * (sampled + trained / (_TRAINING * measured_speed())))


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


def model_size(source: str) -> ModelSize | None:
    """Return the size of a model on the disk, from its configuration and the headers of its weights; None of any other."""
    path = Path(source).expanduser()
    try:
        if is_adapter(str(path)):
            path = Path(adapter_chain(str(path))[0])
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        entries = [entry for file in path.glob("*.safetensors") for entry in read_header(file).values()]
    except (OSError, ValueError, RLHFError):
        return None
    text = config.get("text_config", config)
    numbers = [text.get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")]
    if not entries or not all(isinstance(one, int) for one in numbers):
        return None
    return ModelSize(sum(entry.count for entry in entries), *numbers)


def _rows_and_tokens(data: Any) -> tuple[int | None, float]:
    """Return how many rows some data have, where counting them is cheap, and the tokens of one."""
    texts: list[int] = []
    total: float | None = 0.0
    try:
        for path, weight in (data_files(data) or []) if not list(references(data)) else []:
            file = Path(path).expanduser()
            if not file.is_file():
                total = None
                continue
            lengths = [len(json.dumps(row.values, default=str)) for row in islice(open_source(str(file)).rows(), _SEEN)]
            texts += lengths
            if total is not None and lengths:
                # Compressed files and tables hold fewer bytes than their rows have as JSON.
                whole = len(lengths) < _SEEN
                total += weight * (len(lengths) if whole else file.stat().st_size * len(lengths) / sum(lengths))
    except RLHFError:
        return None, 256.0
    if not texts:
        return None, 256.0
    return None if total is None else round(total), sum(texts) / len(texts) / BYTES_PER_TOKEN


@functools.cache
def measured_speed(precision: str = "float32") -> float:
    """Return this machine's operations per second in matrix products of a precision; on a GPU always 16 bits."""
    import torch

    from rlhf_core.infra.devices import DeviceManager

    device = DeviceManager().device
    kind = torch.float32 if device.type == "cpu" and precision not in ("bf16", "fp16") else torch.bfloat16
    side = 1024 if device.type == "cpu" else 4096
    one = torch.ones(side, side, dtype=kind, device=device)
    # Threads that wait for each other would measure what else runs at the moment, so one thread stands for all.
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (one @ one).sum().item()
        fastest, end = math.inf, time.monotonic() + 0.2
        while (began := time.monotonic()) < end:
            (one @ one).sum().item()
            fastest = min(fastest, time.monotonic() - began)
    finally:
        torch.set_num_threads(before)
    return 2.0 * side**3 * (before if device.type == "cpu" else 1) / fastest


def _readable_time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"
