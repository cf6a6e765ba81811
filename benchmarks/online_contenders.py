"""One contender of `online.py` in its own process: makes a few steps of GRPO and prints what each phase of them took.

    python benchmarks/online_contenders.py < work.json

The last line on stdout is JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from generation_contenders import forget_peaks, resident, usage

LEARNING_RATE, KL_WEIGHT, CLIP = 1e-6, 0.04, 0.2
PHASES = ("generation", "reward", "reference", "forward", "backward", "rest")
"""What a step is divided into; `rest` is the optimiser and all that no other phase is."""
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {"auto": {}},
    "trl": {f"{rows} rows": {"rows": rows} for rows in (4, 8, 16)},
}
"""Contender → named settings that affect speed here; the fastest is compared. TRL's is how many completions it forwards at once;
ours finds that itself."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides do: so many steps on the same prompts, after one that isn't timed."""

    contender: str
    setting: str
    """One of the contender's `SETTINGS`."""
    model: str
    precision: str
    """`float32` or `bf16`."""
    threads: int
    prompts: list[str]
    """Each step's prompts, as a user's turn in a chat."""
    completions: int
    """Completions per prompt."""
    tokens: int
    """Tokens of each completion: exactly so many."""
    steps: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The prompts of all steps, in order."""
        return [{"prompt": [{"role": "user", "content": text}]} for text in self.prompts] * (1 + self.steps)


class Clock:
    """Divides steps into phases by the clock and by this process's processor time. One phase inside another isn't part of it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._open: list[str] = []
        self._phases: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def begin(self) -> None:
        """Begin the first step."""
        forget_peaks()
        self._open = ["rest"]
        self._before, self._last = usage(), (time.perf_counter(), time.process_time())

    def end(self) -> None:
        """End a step and begin the next one."""
        self._charge()
        now, before = usage(), self._before
        seconds, cpu = now.wall - before.wall, now.cpu - before.cpu
        self.steps.append({
            "seconds": seconds, "cpu_seconds": cpu, "phases": {name: list(pair) for name, pair in self._phases.items()},
            "others_cores": max(0.0, (now.machine - before.machine - cpu) / seconds),
        })  # fmt: skip
        self._phases.clear()
        self._before, self._last = usage(), (time.perf_counter(), time.process_time())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return run

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._open:
            for number in range(2):
                self._phases[self._open[-1]][number] += now[number] - self._last[number]
        self._last = now


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """Return how many different characters each completion has: cheap, and different within a group."""
    return [float(len(set(one if isinstance(one, str) else one[0]["content"]))) for one in completions]


def ours(work: Work, clock: Clock) -> None:
    """This project's `grpo`; nothing is written."""
    from rlhf_core import registry
    from rlhf_core.registry.hooks import hookimpl
    from rlhf_core.training.phases import Phases

    class Listener:
        @hookimpl
        def run_started(self) -> None:
            clock.begin()

        @hookimpl
        def step_ended(self) -> None:
            clock.end()

    names = {"rollout": "generation", "update": "rest"}
    ordinary = Phases.phase

    @contextlib.contextmanager
    def phase(self: Any, name: str, tokens: int = 0) -> Iterator[None]:
        with ordinary(self, name, tokens), clock.phase(names.get(name, name)):
            yield

    cls: Any = registry.get("trainer", "grpo")

    class Timed(cls):  # type: ignore[misc]
        """Policy gradient on groups of completions, timed."""

        def loss(self, batch: Any) -> Any:
            return clock.timed("forward", super().loss)(batch)

    config = cls.Config(
        variant="grpo", kl_weight=KL_WEIGHT, clip_options={"low": CLIP, "high": CLIP}, learning_rate=LEARNING_RATE,
        batch_size=len(work.prompts), group_size=work.completions, max_steps=1 + work.steps, precision=work.precision,
        lr_schedule="constant", warmup_ratio=0, dataset={"shuffle": False}, logging={"progress": False},
        generation={"max_new_tokens": work.tokens, "min_new_tokens": work.tokens},
    )  # fmt: skip
    Phases.phase = phase  # type: ignore[method-assign, assignment]
    registry.register("hook", "benchmark-clock", Listener())
    Timed(config, model=work.model, data=work.rows, rewards=[reward]).train()


def trl(work: Work, clock: Clock, rows: int) -> None:
    """TRL's `GRPOTrainer`, with transformers' `generate`.

    Args:
        rows: completions that are forwarded at once.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Listener(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            return clock.timed("generation", super()._generate_single_turn)(*args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            return clock.timed("reward", super()._calculate_rewards)(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            name = "forward" if torch.is_grad_enabled() else "reference"
            return clock.timed(name, super()._get_per_token_logps_and_entropies)(*args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return clock.timed("forward", super().compute_loss)(*args, **kwargs)

    whole = len(work.prompts) * work.completions
    rows = min(rows, whole)
    with tempfile.TemporaryDirectory() as directory:
        arguments = GRPOConfig(
            output_dir=directory, per_device_train_batch_size=rows, gradient_accumulation_steps=whole // rows,
            num_generations=work.completions, max_completion_length=work.tokens, max_steps=1 + work.steps,
            generation_kwargs={"min_new_tokens": work.tokens}, temperature=1.0, beta=KL_WEIGHT, epsilon=CLIP,
            loss_type="grpo", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", use_cpu=True,
            bf16=work.precision == "bf16", gradient_checkpointing=False, shuffle_dataset=False, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
        Timed(
            model=model,
            reward_funcs=[reward],
            args=arguments,
            train_dataset=Dataset.from_list(work.rows),
            processing_class=AutoTokenizer.from_pretrained(work.model),
            callbacks=[Listener()],
        ).train()


CONTENDERS: dict[str, Callable[..., None]] = {"ours": ours, "trl": trl}


def measure(work: Work) -> dict[str, Any]:
    """Make the steps and return what each one took, without the first, which allocates memory."""
    import torch

    torch.set_num_threads(work.threads)
    clock = Clock()
    torch.Tensor.backward = clock.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign, assignment]
    CONTENDERS[work.contender](work, clock, **SETTINGS[work.contender][work.setting])
    if len(clock.steps) != 1 + work.steps:
        raise RuntimeError(f"{len(clock.steps)} steps instead of {1 + work.steps}")
    return {"first_step": clock.steps[0], "steps": clock.steps[1:], "resident_bytes": resident(peak=True)}


if __name__ == "__main__":
    print(json.dumps(measure(Work(**json.load(sys.stdin)))))
