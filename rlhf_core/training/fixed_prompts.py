"""The fixed prompts of a run, which the policy completes now and then, so that people see over the steps what it says.

Each time they are completed with the same random numbers, so what differs between two texts is the policy's doing. Training is
not affected: no random state, module or metric is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.config.online import OnlineConfig, SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.records import Message
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.data.prompt_rows import PromptRow, read_prompts
from rlhf_core.generation.generate import encode_prompts
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.seeds import RandomState, stream_seed
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.training.sample_log import prompt_sample

if TYPE_CHECKING:
    from rlhf_core.training.run import Run
    from rlhf_core.training.setup import RunSetup

log = logging.getLogger(__name__)

PLACE = "logging.samples.prompts"


def open_fixed_prompts(trainer: Trainer[Any]) -> list[PromptRow]:
    """Return the prompts of `logging.samples`, read before a model is loaded.

    Raises:
        ConfigError: the method has no policy to complete them, or there is nowhere to keep the completions.
        DataError: a file can't be read, or a prompt is empty.
    """
    config = trainer.config
    samples = config.logging.samples
    if not samples.prompts:
        return []
    if "policy" not in trainer.roles:
        raise ConfigError(
            f"{type(trainer).__name__} has no policy, which would complete the prompts",
            place=PLACE,
            got=f"roles {', '.join(trainer.roles)}",
            fix="leave `logging.samples` out",
        )
    if trainer.output is None and not config.logging.trackers:
        raise ConfigError("there is nowhere to keep the completions", place=PLACE, fix="set `output`")
    found = read_prompts(
        samples.prompts,
        limit=samples.limit,
        columns=config.dataset.columns,
        name=PLACE,
        streaming=config.dataset.streaming,
    )
    return list(found)


class FixedPrompts:
    """Completes the fixed prompts of one run: at its start, at each evaluation or every so many steps, and at its end.

    Never inside a rollout. What is due when the run is stopped is done when it resumes, so a resumed run completes them at the
    same steps as one that was never stopped.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._options = run, run.setup.config.logging.samples
        self._batch = _encoded(run.setup) if run.setup.prompts else None

    def is_due(self, step: int) -> bool:
        """Return whether the prompts are to be completed after `step`, given when that was done last."""
        progress, every = self._run.progress, self._options.every
        if self._batch is None or progress.sampled == step:
            return False
        if step in (0, self._run.total_steps):
            return True
        return progress.evaluated == step if every is None else step // every > (progress.sampled or 0) // every

    def catch_up(self) -> None:
        """Complete the prompts if that is due after the last step; not inside a rollout, from where no run can be resumed."""
        if self.is_due(self._run.progress.step):
            self._complete_or_save()

    def finish(self) -> None:
        """Complete the prompts at the end of the run, if that hasn't been done after its last step."""
        if self._batch is not None and self._run.progress.sampled != self._run.progress.step:
            self._complete_or_save()

    def _complete_or_save(self) -> None:
        """Complete the prompts; where that fails, the run's state is saved first. Not with several processes, which may wait."""
        run = self._run
        try:
            with run.stopping_at_once():
                self._complete()
        except Exception:
            if run.distribution.world_size == 1:
                run.save()
            raise

    def _complete(self) -> None:
        run, step = self._run, self._run.progress.step
        random = RandomState.capture()
        try:
            with torch.no_grad(), run.setup.devices.autocast(run.setup.config.precision):
                mine = list(self._rows(step))
        finally:
            random.restore()
        rows = [row for part in run.distribution.gather(mine) for row in part]
        rows.sort(key=lambda row: (row["row"], row["sample"]))
        run.distribution.on_main(lambda: run.logger.samples.completed(rows, step))
        run.progress.sampled = step
        log.info(
            "step %d  completed the fixed prompts, %d in all: `rlhf samples` shows them", step, len(run.setup.prompts)
        )

    def _rows(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of this process's share of the prompts."""
        run, batch, n = self._run, self._batch, self._options.n
        assert batch is not None
        numbers = range(batch.num_prompts)[run.distribution.rank :: run.distribution.world_size]
        if not numbers:
            return
        seed = run.setup.config.seed
        seeds = [[stream_seed(seed, "samples", number, sample) for sample in range(n)] for number in numbers]
        drawn = run.context.engine.generate(batch.select(list(numbers)), n, _sampling(run.setup), seeds=seeds)
        for number, completions in zip(numbers, drawn, strict=True):
            for sample, completion in enumerate(completions):
                yield prompt_sample(step, number, sample, batch.prompts[number], completion)


def _sampling(setup: RunSetup) -> SamplingConfig:
    """Return how the completions are drawn."""
    config = setup.config
    if config.logging.samples.generation is not None:
        return config.logging.samples.generation
    return config.generation if isinstance(config, OnlineConfig) else SamplingConfig()


def _encoded(setup: RunSetup) -> Batch:
    """Return the prompts encoded as the run's own rows are: a text is the user's turn where they are chats.

    Raises:
        ConfigError: the method's policy is of another class than the engine can draw from.
        DataError: a prompt is too long for the model.
        ModelError: the tokenizer lacks what the prompts need, such as a chat template.
    """
    policy = dict(setup.trainer.models.items()).get("policy")
    if not isinstance(policy, PolicyModel):
        got = "none" if policy is None else type(policy).__name__
        raise ConfigError("the method's policy can't complete prompts", place=PLACE, got=got, fix="leave it out")
    asks = setup.dataset.encoder.chats and setup.config.dataset.wrap != "none"
    rows = []
    for number, row in enumerate(setup.prompts):
        chat = [Message(role="user", content=row.prompt)] if isinstance(row.prompt, str) and asks else None
        rows.append(PromptRow(chat or row.prompt, row.place, row.tools).as_row(number))
    return encode_prompts(policy, rows)
