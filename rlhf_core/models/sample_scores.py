"""Scores of samples by a model: encoded as in training, batched by tokens, and remembered."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field

from rlhf_core.batch import Batch
from rlhf_core.config import BaseConfig
from rlhf_core.data.collate import collate
from rlhf_core.data.encode import EncodedRow, Encoder
from rlhf_core.data.files import Cursor, Row
from rlhf_core.errors import DataError
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.interfaces import Sample

log = logging.getLogger(__name__)

ScoreT = TypeVar("ScoreT")


class ScoringConfig(BaseConfig):
    """Options that every reward by a model has."""

    max_length: int = Field(2048, ge=2, description="Most tokens in a prompt with its completion; more are cut off.")
    batch_tokens: int = Field(
        8192, ge=1, description="Most tokens in one forward pass; larger is faster and takes more memory."
    )
    cache_size: int = Field(10_000, ge=0, description="Scores of texts that are remembered; larger takes more memory.")
    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32",
        description="Precision of the backbone's matrix products and weights; 16 bits are faster and take half the memory.",
    )


class SampleScores(Generic[ScoreT]):
    """Gives each sample what a model makes of its prompt and completion.

    Completions are scored as text: a reward model may have another tokenizer than the policy that wrote them. Samples of one
    prompt share its computation.

    Args:
        score: what the model makes of a batch, one entry a response.
        model: a `RewardModel` or `ProcessRewardModel`; its tokenizer, device and positions count.
        config: what is longer than `max_length` is cut at its end, and told of once.
    """

    def __init__(self, score: Callable[[Batch], Sequence[ScoreT]], model: Any, config: ScoringConfig) -> None:
        self.score, self.model, self.config = score, model, config
        self.max_length: int = min(config.max_length, model.max_positions or config.max_length)
        self.responses = Encoder(model.tokenizer, "sft", max_length=self.max_length)
        self.prompts = Encoder(model.tokenizer, "prompt", max_length=self.max_length)
        self.end: int = model.tokenizer.eos_token_id
        self.devices = DeviceManager(model.device.type)
        self.cache: OrderedDict[str, ScoreT] = OrderedDict()
        self._told = False

    def __call__(self, samples: Sequence[Sample]) -> list[ScoreT]:
        """Return one score a sample, in order.

        Raises:
            DataError: a prompt leaves no room for a completion.
        """
        keys = [json.dumps([sample.prompt, sample.completion, sample.columns.get("tools")]) for sample in samples]
        known = {key: self.cache[key] for key in keys if key in self.cache}
        new = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in known}
        for part, scores in self._computed(new):
            known |= zip(part, scores, strict=True)
        for key in keys:
            self.cache[key] = known[key]
            self.cache.move_to_end(key)
        while len(self.cache) > self.config.cache_size:
            self.cache.popitem(last=False)
        return [known[key] for key in keys]

    def _computed(self, samples: dict[str, Sample]) -> Iterator[tuple[list[str], Sequence[ScoreT]]]:
        """Yield keys with their scores, a forward pass at a time."""
        if not samples:
            return
        rows = self._rows(list(samples.values()))
        keys = list(samples)
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            by_prompt.setdefault(tuple(row.prompt_ids), []).append(number)
        shared = [
            EncodedRow(
                numbers[0],
                rows[numbers[0]].prompt_ids,
                [rows[number].responses[0] for number in numbers],
                [rows[number].masks[0] for number in numbers],
            )
            for numbers in by_prompt.values()
        ]
        order = {row.index: numbers for row, numbers in zip(shared, by_prompt.values(), strict=True)}
        with torch.no_grad(), self.devices.autocast(self.config.precision):
            for micro in collate(shared).split(max_tokens=self.config.batch_tokens):
                numbers = [number for row in micro.rows for number in order[row]]
                yield [keys[number] for number in numbers], self.score(micro.to(self.model.device))

    def _rows(self, samples: Sequence[Sample]) -> list[EncodedRow]:
        """Encode samples as training does; a completion without any text is its end token alone."""
        rows = []
        cut = 0
        for number, sample in enumerate(samples):
            empty = not sample.completion.strip()
            values = {"prompt": sample.prompt, "response": sample.completion, "tools": sample.columns.get("tools")}
            row = Row(number, f"sample {number}", values, Cursor())
            (outcome,) = (self.prompts if empty else self.responses).encode([row])
            if outcome.row is None:
                raise DataError(f"can't be scored: {outcome.refused}", place=f"sample {number}", fix=self._more_room())
            cut += outcome.truncated
            if empty:
                rows.append(EncodedRow(number, outcome.row.prompt_ids, [[self.end]], [[True]]))
            else:
                rows.append(outcome.row)
        if cut and not self._told:
            self._told = True
            log.warning(
                "%d of %d samples are longer than %d tokens and scored without their ends (this is said once): %s",
                cut, len(samples), self.max_length, self._more_room(),
            )  # fmt: skip
        return rows

    def _more_room(self) -> str:
        if self.max_length < self.config.max_length:
            return f"use shorter completions, for the model has {self.max_length} positions"
        return "raise `max_length`"
