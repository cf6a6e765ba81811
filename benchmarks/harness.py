"""One training run of ours or of the peer, TRL: the same rows, tokens and hyper-parameters, timed by the same clock.

`training.py` compares the two on real data, `gpu.py` on a machine with a GPU and nothing but this checkout. Both run each side in
its own process, so that peak memory is measured for each.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-6
RECORDS = {"sft": "sft", "dpo": "preference", "reward_model": "preference", "kto": "unpaired"}
"""Method → record type of its rows."""

PEER_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}},
    "dpo": {"padded": {}},
    "reward_model": {"padded": {}},
    "kto": {"padded": {}},
}
"""Method → named options of TRL that affect speed here. Both sides run without gradient checkpointing, on rows truncated
beforehand."""


@dataclass(frozen=True)
class Cell:
    """What is trained in one measurement: a method, its model and rows, for a number of steps."""

    method: str
    model: str
    rows: list[dict[str, Any]]
    """At least `batch` × `steps` rows, in the order in which they are used."""
    precision: str = "float32"
    setting: str = "padded"
    """TRL's options: a name in `PEER_SETTINGS`."""
    batch: int = 8
    steps: int = 9
    max_length: int = 512


class Clock:
    """Measures the seconds of each step, until the GPU has finished it.

    Args:
        after: called with a step's number, counted from 1, after it was timed and before the next one is.
    """

    def __init__(self, after: Callable[[int], None] = lambda step: None) -> None:
        self.after = after
        self.seconds: list[float] = []

    def begin(self) -> None:
        self.last = time.perf_counter()

    def end(self) -> None:
        wait_for_device()
        self.seconds.append(time.perf_counter() - self.last)
        self.after(len(self.seconds))
        self.last = time.perf_counter()


def on_gpu() -> bool:
    """Tell whether both sides train on a GPU: there is one, and `ACCELERATE_USE_CPU` doesn't forbid it."""
    import torch

    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "0") not in ("1", "true")


def wait_for_device() -> None:
    """Wait until the GPU, where there is one, has done what it was given."""
    if on_gpu():
        import torch

        torch.cuda.synchronize()


def peak_memory() -> int:
    """Return the most bytes so far: allocated on a GPU, else resident in this process."""
    import torch

    if on_gpu():
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no peak memory in /proc/self/status")


def forget_peak() -> None:
    """Begin a GPU's peak again: what was done before the run isn't the run's."""
    if on_gpu():
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def matmul_rate(precision: str) -> float:
    """Return the machine's measured rate on the shapes of a model of 135M, floating-point operations per second."""
    import torch

    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    device = "cuda" if on_gpu() else "cpu"
    times_each = 50 if device == "cuda" else 1  # a GPU's product takes less time than its launch
    rates = []
    for m, k, n in ((2048, 576, 1536), (2048, 1536, 576), (2048, 576, 576)):
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        wait_for_device()
        times: list[float] = []
        # Where a processor has no instructions for bf16, one product takes a second.
        while len(times) < 3 or (len(times) < 30 and sum(times) * times_each < 2):
            began = time.perf_counter()
            for _ in range(times_each):
                a @ b
            wait_for_device()
            times.append((time.perf_counter() - began) / times_each)
        rates.append(2 * m * k * n / statistics.median(times))
    return statistics.fmean(rates)


def encoded(cell: Cell) -> list[Any]:
    """Return the cell's rows as token ids, which both sides train on."""
    from transformers import AutoTokenizer

    from rlhf_core.config.training import TrainerConfig
    from rlhf_core.data import open_dataset

    tokenizer = AutoTokenizer.from_pretrained(cell.model)
    config = TrainerConfig(max_length=cell.max_length)
    dataset = open_dataset(cell.rows, RECORDS[cell.method], tokenizer, config=config)
    return [dataset[i] for i in range(cell.batch * cell.steps)]


def step_tokens(rows: list[Any], batch: int) -> list[int]:
    """Return the tokens of each step: every response with its prompt, padding not at all."""
    tokens = [len(row.prompt_ids) * len(row.responses) + sum(map(len, row.responses)) for row in rows]
    return [sum(tokens[start : start + batch]) for start in range(0, len(tokens), batch)]


def ours(cell: Cell, clock: Clock) -> None:
    """Train with this project. Nothing is written, so that only training is timed."""
    from rlhf_core import registry
    from rlhf_core.registry.hooks import hookimpl

    class Listener:
        @hookimpl
        def run_started(self) -> None:
            clock.begin()

        @hookimpl
        def step_ended(self) -> None:
            clock.end()

    cls: Any = registry.get("trainer", cell.method)
    config = cls.Config(
        learning_rate=LEARNING_RATE, batch_size=cell.batch, max_steps=cell.steps, max_length=cell.max_length,
        precision=cell.precision, lr_schedule="constant", warmup_ratio=0, dataset={"shuffle": False},
        logging={"progress": False},
    )  # fmt: skip
    registry.register("hook", "benchmark-clock", Listener())
    try:
        cls(config, model=cell.model, data=cell.rows).train()
    finally:
        registry.unregister("hook", "benchmark-clock")


def peer(cell: Cell, clock: Clock) -> None:
    """Train with TRL, on the token ids that ours makes of the rows."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    class Listener(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    class InOrder:
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # it is tokenised already

    trainer_class, config_class, extra = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {"completion_only_loss": True}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": 0.1}),
        "reward_model": (trl.RewardTrainer, trl.RewardConfig, {}),
        "kto": (trl.KTOTrainer, trl.KTOConfig, {"beta": 0.1}),
    }[cell.method]
    tokenizer = AutoTokenizer.from_pretrained(cell.model)
    models = {"model": _peer_model(cell, tokenizer)}
    if cell.method in ("dpo", "kto"):
        models["ref_model"] = _peer_model(cell, tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        arguments: dict[str, Any] = {
            "output_dir": directory, "per_device_train_batch_size": cell.batch, "max_steps": cell.steps,
            "max_length": cell.max_length, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
            "use_cpu": not on_gpu(), "bf16": cell.precision == "bf16", "report_to": "none",
            "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
            "dataloader_pin_memory": on_gpu(), **extra, **PEER_SETTINGS[cell.method][cell.setting],
        }  # fmt: skip
        trainer = type("InOrder", (InOrder, trainer_class), {})(
            **models,
            args=config_class(**arguments),
            train_dataset=Dataset.from_list(_peer_rows(cell)),
            processing_class=tokenizer,
            callbacks=[Listener()],
        )
        trainer.train()


def _peer_rows(cell: Cell) -> list[dict[str, Any]]:
    """Return the rows in the columns that the peer's trainers take when they are tokenised already."""
    found = encoded(cell)
    if cell.method == "sft":
        return [
            {
                "input_ids": row.prompt_ids + row.responses[0],
                "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.responses[0]),
            }
            for row in found
        ]
    if cell.method == "reward_model":
        return [
            {"chosen_ids": row.prompt_ids + row.responses[0], "rejected_ids": row.prompt_ids + row.responses[1]}
            for row in found
        ]
    if cell.method == "dpo":
        return [
            {"prompt_ids": row.prompt_ids, "chosen_ids": row.responses[0], "rejected_ids": row.responses[1]}
            for row in found
        ]
    others = [
        found[start + (i + 1) % cell.batch] for start in range(0, len(found), cell.batch) for i in range(cell.batch)
    ]
    return [
        {
            "prompt_ids": row.prompt_ids,
            "completion_ids": row.responses[0],
            "KL_completion_ids": other.responses[0],
            "label": bool(row.per_response["desirable"][0]),
        }
        for row, other in zip(found, others, strict=True)
    ]


def _peer_model(cell: Cell, tokenizer: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if cell.method != "reward_model":
        return AutoModelForCausalLM.from_pretrained(cell.model, dtype=torch.float32)
    made = AutoModelForSequenceClassification.from_pretrained(cell.model, num_labels=1, dtype=torch.float32)
    made.config.pad_token_id = tokenizer.pad_token_id
    return made


SIDES: dict[str, Callable[[Cell, Clock], None]] = {"ours": ours, "peer": peer}
