"""Rough estimates of the memory and time of a training run, from parameters and tokens, before anything runs.

Memory: 8 bytes for each trained parameter (float32 weights and gradients) and what the optimiser keeps (AdamW's two moments are
another 8), the bytes of frozen models, and activations of one micro-batch: 34 bytes per token, layer and unit of width at 16 bits
(Korthikanti et al. 2022, arXiv 2205.05198, without attention's scores), twice that in float32, and the logits.

Time: 6 operations per trained parameter and token, 2 per parameter and token that is only read, at the speed of this machine's
matrix products in the run's precision, which are measured for an instant; half of that speed is reached in training, a quarter in
generation, of many rows at once. An estimate can be off by a factor of three.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import BYTES_PER_WEIGHT, TrainerConfig
from rlhf_core.infra.errors import RLHFError
from rlhf_core.infra.files import readable_size
from rlhf_core.infra.model_files import adapter_chain, is_adapter
from rlhf_core.infra.safetensors_file import read_header

BYTES_PER_TOKEN = 4
"""Bytes of text for one token, as of English with a usual vocabulary."""
TRAINING_SPEED, GENERATION_SPEED = 0.5, 0.25
"""Shares of the measured speed that are reached."""


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that costs follow from."""

    parameters: int
    layers: int
    width: int
    vocabulary: int


@dataclass(frozen=True)
class RunCost:
    """What a run takes; None for what can't be known yet."""

    memory: float | None = None
    """Bytes, of the device that it runs on."""
    seconds: float | None = None

    def cells(self) -> tuple[str, str]:
        """Return both as a table shows them."""
        memory = "?" if self.memory is None else f"~{readable_size(self.memory)}"
        return memory, "?" if self.seconds is None else f"~{readable_time(self.seconds)}"

    def as_dict(self) -> dict[str, float | None]:
        """Return JSON values."""
        return {"memory_bytes": self.memory, "seconds": self.seconds}


def training_cost(
    size: ModelSize,
    options: TrainerConfig,
    roles: Mapping[str, Any],
    *,
    rows: float | None,
    prompt_tokens: float,
    trained_parameters: int | None = None,
) -> RunCost:
    """Return the cost of a training run.

    Args:
        size: of the model that is trained.
        roles: of the method.
        rows: of an epoch; None where that isn't known.
        prompt_tokens: tokens of a row, on average; of an online method those of a prompt.
        trained_parameters: how many parameters of the model are trained; None estimates it for an adapter.
    """
    online = options if isinstance(options, OnlineConfig) else None
    responses = online.group_size if online is not None else 1
    written = online.generation.max_new_tokens / 2 if online is not None else 0.0
    tokens = min(prompt_tokens + written, options.max_length or 1024)
    precise = 4 if options.precision == "float32" else 2
    adapter: float = 0
    if options.lora is not None:
        adapter = trained_parameters or 16 * size.layers * size.width * options.lora.rank
    moving = size.parameters
    if options.freeze and trained_parameters is not None:
        moving = trained_parameters
    trained = sum(getattr(role, "trained", False) for role in roles.values())
    vocabulary = 0 if adapter else min(size.vocabulary * size.width, moving)  # AdamW's in any case
    kept = 8.0 * vocabulary + BYTES_PER_WEIGHT[options.optimizer.name] * ((adapter or moving) - vocabulary)
    memory = (8.0 * (adapter or moving) + kept) * trained
    memory += precise * size.parameters if adapter else 4 * (size.parameters - moving)
    if "reference" in roles and not adapter:
        memory += precise * size.parameters
    at_once = tokens * (options.micro_batch_size or options.batch_size * responses)
    if (bound := _micro_batch_tokens(options, size)) is not None:
        at_once = min(at_once, max(bound, tokens))
    memory += at_once * (17 * precise * size.layers * size.width + 8 * size.vocabulary)
    steps = options.max_steps
    if steps is None:
        if rows is None:
            return RunCost(memory)
        steps = max(1, round(rows * (options.epochs or 1) / options.batch_size))
    sequences = steps * options.batch_size * responses
    passes = (online.rollout_epochs if online is not None else 1) * trained
    operations = size.parameters * sequences * tokens * (6 * passes + 2 * (len(roles) - trained))
    speed = measured_speed(options.precision)
    seconds = operations / (TRAINING_SPEED * speed)
    seconds += 2 * size.parameters * sequences * written / (GENERATION_SPEED * speed)
    return RunCost(memory, seconds)


def _micro_batch_tokens(options: TrainerConfig, size: ModelSize) -> int | None:
    """Return the most tokens of a micro-batch on this process's device; None where nothing bounds them."""
    from rlhf_core.infra.devices import DeviceManager
    from rlhf_core.training.micro_batches import CACHED_NUMBERS

    bound = options.batching.micro_batch_tokens
    if bound == "auto":
        return max(1, CACHED_NUMBERS // size.width) if DeviceManager().device.type == "cpu" else None
    return bound


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


@functools.cache
def measured_speed(precision: str = "float32") -> float:
    """Return this machine's operations per second in matrix products of a precision; on a GPU always 16 bits."""
    import torch

    from rlhf_core.infra.devices import DeviceManager, one_thread

    device = DeviceManager().device
    kind = torch.float32 if device.type == "cpu" and precision not in ("bf16", "fp16") else torch.bfloat16
    side = 1024 if device.type == "cpu" else 4096
    one = torch.ones(side, side, dtype=kind, device=device)
    # Threads that wait for each other would measure what else runs at the moment, so one thread stands for all.
    with one_thread():
        (one @ one).sum().item()
        fastest, end = math.inf, time.monotonic() + 0.2
        while (began := time.monotonic()) < end:
            (one @ one).sum().item()
            fastest = min(fastest, time.monotonic() - began)
    return 2.0 * side**3 * (torch.get_num_threads() if device.type == "cpu" else 1) / fastest


def readable_time(seconds: float) -> str:
    """Return a duration for people, in seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"
