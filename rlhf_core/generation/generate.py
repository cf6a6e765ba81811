"""Completions for prompts given in Python (texts, chats or rows), which are encoded as in training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
    from rlhf_core.generation.prompt_compression import CompressedPrompt, PromptCompression
    from rlhf_core.models.policy_model import PolicyModel


class PromptTooLong(DataError):
    """A prompt leaves no room for a completion among the model's positions."""


def prompt_batch(policy: PolicyModel, prompts: Sequence[Any]) -> Batch:
    """Return prompts encoded as in the policy's training, as a batch without responses.

    Args:
        prompts: texts, lists of chat messages, or rows: mappings with a `prompt`, the `tools` of its chat, and other columns,
            which become the batch's `records`. `EncodedPrompts` of the policy's tokenizer are taken as they are, and so are
            token ids, where each prompt is a list of them: as text they count as what the tokenizer decodes them to.

    Raises:
        DataError: a prompt (named `prompts[3]`) can't be read, is empty, holds an id that isn't in the vocabulary, or leaves no
            room for a completion among the model's positions; or one prompt is given in place of a list.
    """
    if isinstance(prompts, EncodedPrompts) and prompts.tokenizer is policy.tokenizer:
        return prompts.batch.to(policy.device)
    if isinstance(prompts, str | Mapping) or _is_one_prompt(prompts := [*prompts]):
        fix = "put it into a list: `[prompt]`"
        raise DataError("a list of prompts is needed", place="prompts", got="one prompt", fix=fix)
    given = [_token_ids(prompt) for prompt in prompts]
    ids = [one for one in given if one is not None]
    if ids and len(ids) == len(given):
        return _batch_of_ids(policy, ids)
    return encode_prompts(policy, _as_rows(prompts))


def _is_one_prompt(prompts: Sequence[Any]) -> bool:
    """Tell whether the messages of a chat, or the ids of a prompt, are given where a list of such is needed."""
    kinds = {
        "message" if isinstance(one, Mapping) and "role" in one and "prompt" not in one else type(one)
        for one in prompts
    }
    return kinds in ({"message"}, {int})


def _token_ids(prompt: Any) -> list[int] | None:
    """Return a prompt that is token ids, such as a list of ints or a tensor (L,), as a list; None for any other prompt."""
    found = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(found, list | tuple) and found and all(type(one) is int for one in found):
        return [*found]
    return None


def _batch_of_ids(policy: PolicyModel, prompts: Sequence[list[int]]) -> Batch:
    """Return prompts that are token ids as a batch without responses.

    Raises:
        DataError: an id isn't in the vocabulary, or a prompt leaves no room for a completion.
    """
    places = [f"prompts[{number}]" for number in range(len(prompts))]
    size = policy.network.config.get_text_config().vocab_size
    for ids, place in zip(prompts, places, strict=True):
        if (wrong := next((one for one in ids if not 0 <= one < size), None)) is not None:
            raise DataError(f"the model's vocabulary has ids 0 to {size - 1}", place=place, got=wrong)
    rows = [EncodedRow(number, ids, prompt=policy.tokenizer.decode(ids)) for number, ids in enumerate(prompts)]
    _check_room(policy, rows, places)
    return collate(rows).to(policy.device)


def encode_prompts(policy: PolicyModel, prompts: Sequence[Row], *, compressed: bool = True) -> Batch:
    """Return rows of the record type `prompt` encoded as in the policy's training, as a batch without responses.

    Args:
        compressed: whether long prompts are compressed where the policy reads them so. Else they are only encoded, and what is
            longer than the model's positions isn't refused.

    Raises:
        DataError: a prompt can't be read, is empty, or leaves no room for a completion among the model's positions.
        ModelError: the tokenizer lacks what the prompts need, such as a chat template.
    """
    compression = policy.prompt_compression
    if compression is not None and compressed:
        rows, read = _compressed(policy, compression, prompts)
        rows = [replace(row, prompt_ids=list(one.ids)) for row, one in zip(rows, read, strict=True)]
    else:
        rows = _encoded(Encoder(policy.tokenizer, "prompt", max_length=2**31), prompts)
    if compression is None or compressed:
        _check_room(policy, rows, [row.place for row in prompts])
    batch = collate(rows) if rows else collate([EncodedRow(0, [0])]).select([])
    return batch.to(policy.device)


def compressed_prompts(
    policy: PolicyModel, compression: PromptCompression, prompts: Sequence[Any]
) -> list[CompressedPrompt]:
    """Return prompts as a policy with this compression reads them.

    Args:
        prompts: texts, lists of chat messages, or rows with a `prompt`.

    Raises:
        DataError: a prompt can't be read.
    """
    return _compressed(policy, compression, _as_rows(prompts))[1]


def _as_rows(prompts: Sequence[Any]) -> list[Row]:
    """Return texts, chats and mappings as rows."""
    asked = [prompt if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
    return list(ListRows(asked, "prompts").rows(Cursor()))


def _encoded(encoder: Encoder, prompts: Sequence[Row]) -> list[EncodedRow]:
    """Return encoded prompts; raise `DataError` for one that can't be read, or is empty."""
    rows: list[EncodedRow] = []
    for outcome in encoder.encode(prompts):
        if outcome.row is None:
            raise DataError(f"no completion can be drawn for the prompt: {outcome.refused}", place=outcome.place)
        asked = outcome.row.prompt
        if not (asked if isinstance(asked, str) else any(turn["content"] or len(turn) > 2 for turn in asked)):
            raise DataError("the prompt is empty", place=outcome.place, fix="give it some text")
        rows.append(outcome.row)
    return rows


def _compressed(
    policy: PolicyModel, compression: PromptCompression, prompts: Sequence[Row]
) -> tuple[list[EncodedRow], list[CompressedPrompt]]:
    """Return encoded prompts, and each as the policy reads it."""
    encoder = Encoder(policy.tokenizer, "prompt", max_length=2**31)

    def encode(rows: Sequence[Mapping[str, Any]]) -> list[EncodedRow]:
        given = [{name: value for name, value in row.items() if value is not None} for row in rows]
        return _encoded(encoder, _as_rows(given))

    rows = _encoded(encoder, prompts)
    return rows, compression.compress(rows, [row.values.get("tools") for row in prompts], encode)


def _check_room(policy: PolicyModel, rows: Sequence[EncodedRow], places: Sequence[str]) -> None:
    positions = policy.max_positions or 2**31
    for row, place in zip(rows, places, strict=True):
        if (length := len(row.prompt_ids)) >= positions:
            fix = "shorten the prompt, or compress long ones: `--compress.over`"
            problem = "the prompt leaves no room for a completion among the model's positions"
            raise PromptTooLong(problem, place=place, got=f"{length} tokens for {positions} positions", fix=fix)


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
