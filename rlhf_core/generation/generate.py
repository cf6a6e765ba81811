"""Completions for prompts given in Python (texts, chats or rows), which are encoded as in training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.data.collate import collate
from rlhf_core.data.data_source import ListRows
from rlhf_core.data.encoder import EncodedRow, Encoder
from rlhf_core.data.row_source import Cursor, Row
from rlhf_core.generation.encoded_prompts import EncodedPrompts
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.errors import DataError

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel


class PromptTooLong(DataError):
    """A prompt leaves no room for a completion among the model's positions."""


def prompt_batch(policy: PolicyModel, prompts: Sequence[Any]) -> Batch:
    """Return prompts encoded as in the policy's training, as a batch without responses.

    Args:
        prompts: texts, lists of chat messages, or rows: mappings with a `prompt`, the `tools` of its chat, and other columns,
            which become the batch's `records`. `EncodedPrompts` of the policy's tokenizer are taken as they are.

    Raises:
        DataError: a prompt (named `prompts[3]`) can't be read, is empty, or leaves no room for a completion among the model's
            positions.
    """
    if isinstance(prompts, EncodedPrompts) and prompts.tokenizer is policy.tokenizer:
        return prompts.batch.to(policy.device)
    asked = [prompt if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
    return encode_prompts(policy, list(ListRows(asked, "prompts").rows(Cursor())))


def encode_prompts(policy: PolicyModel, prompts: Sequence[Row]) -> Batch:
    """Return rows of the record type `prompt` encoded as in the policy's training, as a batch without responses.

    Raises:
        DataError: a prompt can't be read, is empty, or leaves no room for a completion among the model's positions.
        ModelError: the tokenizer lacks what the prompts need, such as a chat template.
    """
    positions = policy.max_positions or 2**31
    rows: list[EncodedRow] = []
    for outcome in Encoder(policy.tokenizer, "prompt", max_length=2**31).encode(prompts):
        if outcome.row is None:
            raise DataError(f"no completion can be drawn for the prompt: {outcome.refused}", place=outcome.place)
        asked = outcome.row.prompt
        if not (asked if isinstance(asked, str) else any(turn["content"] or len(turn) > 2 for turn in asked)):
            raise DataError("the prompt is empty", place=outcome.place, fix="give it some text")
        if (length := len(outcome.row.prompt_ids)) >= positions:
            raise PromptTooLong(
                "the prompt leaves no room for a completion among the model's positions",
                place=outcome.place,
                got=f"{length} tokens for {positions} positions",
                fix="shorten the prompt",
            )
        rows.append(outcome.row)
    batch = collate(rows) if rows else collate([EncodedRow(0, [0])]).select([])
    return batch.to(policy.device)


def generate(
    policy: PolicyModel,
    prompts: Sequence[Any],
    n: int,
    sampling: SamplingConfig,
    *,
    seed: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """Return n completions for each prompt, in the order in which they were drawn; see `PolicyModel.generate`."""
    ended = itertools.count(1)

    def finished(prompt: int, index: int, completion: Completion) -> None:
        if progress is not None:
            progress(next(ended), n * len(prompts))

    return Engine(policy, seed=seed).generate(prompt_batch(policy, prompts), n, sampling, finished=finished)
