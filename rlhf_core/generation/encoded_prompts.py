"""Prompts for a sampler that are encoded already: those of a batch of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from rlhf_core.contracts.batch import Batch

CONTEXT = ("prompt", "input", "system", "history")
"""Columns of a row that have become part of its prompt, and must not be read again."""


class EncodedPrompts(Sequence[Mapping[str, Any]]):
    """The prompts of a batch as a sampler takes them: rows, which `prompt_batch` doesn't encode again.

    Args:
        batch: its responses are ignored. Its places, or without them its rows, tell prompts with equal tokens apart: each gets
            seeds of its own, on whichever process.
        tokenizer: the one that encoded it. A model with another tokenizer reads the rows.

    Raises:
        ValueError: the batch lacks `prompts`, the prompts as in the data.
    """

    def __init__(self, batch: Batch, tokenizer: Any) -> None:
        if len(batch.prompts) != batch.num_prompts:
            raise ValueError("the batch lacks `prompts`, the prompts as in the data, which a sampler needs")
        self.batch = replace(batch, places=batch.places or batch.rows)
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.batch.num_prompts

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedPrompts: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | EncodedPrompts:
        if isinstance(index, slice):
            return EncodedPrompts(self.batch.select(list(range(len(self))[index])), self.tokenizer)
        columns = self.batch.records[index] if self.batch.records else {}
        own = {name: value for name, value in columns.items() if name not in CONTEXT}
        return {**own, "prompt": self.batch.prompts[index]}
