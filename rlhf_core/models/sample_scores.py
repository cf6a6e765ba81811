"""Scores of samples by a model: encoded as in training, batched by tokens, and remembered."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

from rlhf_core.batch import Batch
from rlhf_core.data.collate import collate
from rlhf_core.data.encode import EncodedRow, Encoder
from rlhf_core.data.files import Cursor, Row
from rlhf_core.errors import DataError
from rlhf_core.interfaces import Sample

ScoreT = TypeVar("ScoreT")


class SampleScores(Generic[ScoreT]):
    """Gives each sample what a model makes of its prompt and completion.

    Completions are scored as text: a reward model may have another tokenizer than the policy that wrote them. Samples of one
    prompt share its computation.

    Args:
        score: what the model makes of a batch, one entry a response.
        tokenizer: the model's.
        device: where it stands.
        max_length: most tokens in a prompt with its completion; what is longer is cut at its end.
        batch_tokens: most tokens in one forward pass, each prompt counted once.
        cache_size: how many scores are remembered, so that a text that comes again costs nothing.
    """

    def __init__(
        self,
        score: Callable[[Batch], Sequence[ScoreT]],
        tokenizer: Any,
        *,
        device: torch.device,
        max_length: int,
        batch_tokens: int,
        cache_size: int,
    ) -> None:
        self.score, self.device = score, device
        self.batch_tokens, self.cache_size = batch_tokens, cache_size
        self.responses = Encoder(tokenizer, "sft", max_length=max_length)
        self.prompts = Encoder(tokenizer, "prompt", max_length=max_length)
        self.end: int = tokenizer.eos_token_id
        self.cache: OrderedDict[str, ScoreT] = OrderedDict()

    def __call__(self, samples: Sequence[Sample]) -> list[ScoreT]:
        """Return one score a sample, in order.

        Raises:
            DataError: a prompt leaves no room for a completion.
        """
        keys = [json.dumps([sample.prompt, sample.completion]) for sample in samples]
        known = {key: self.cache[key] for key in keys if key in self.cache}
        new = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in known}
        for part, scores in self._computed(new):
            known |= zip(part, scores, strict=True)
        for key in keys:
            self.cache[key] = known[key]
            self.cache.move_to_end(key)
        while len(self.cache) > self.cache_size:
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
        with torch.no_grad():
            for micro in collate(shared).split(max_tokens=self.batch_tokens):
                numbers = [number for row in micro.rows for number in order[row]]
                yield [keys[number] for number in numbers], self.score(micro.to(self.device))

    def _rows(self, samples: Sequence[Sample]) -> list[EncodedRow]:
        """Encode samples as training does; a completion without any text is its end token alone."""
        rows = []
        for number, sample in enumerate(samples):
            empty = not sample.completion.strip()
            values = {"prompt": sample.prompt, "response": sample.completion}
            row = Row(number, f"sample {number}", values, Cursor())
            (outcome,) = (self.prompts if empty else self.responses).encode([row])
            if outcome.row is None:
                raise DataError(
                    f"can't be scored: {outcome.refused}", place=f"sample {number}", fix="raise `max_length`"
                )
            if empty:
                rows.append(EncodedRow(number, outcome.row.prompt_ids, [[self.end]], [[True]]))
            else:
                rows.append(outcome.row)
        return rows
