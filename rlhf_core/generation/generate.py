"""Completions for prompts given in Python (texts, chats or rows), which are encoded as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.data.collate import collate
from rlhf_core.data.data_source import ListRows
from rlhf_core.data.encoder import EncodedRow, Encoder
from rlhf_core.data.row_source import Cursor
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.errors import DataError

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel


def prompt_batch(policy: PolicyModel, prompts: Sequence[Any]) -> Batch:
    """Return prompts encoded as in the policy's training, as a batch without responses.

    Args:
        prompts: texts, lists of chat messages, or rows: mappings with a `prompt`, the `tools` of its chat, and other columns,
            which become the batch's `records`.

    Raises:
        DataError: a prompt (named `prompts[3]`) can't be read, or leaves no room for a completion among the model's positions.
    """
    encoder = Encoder(policy.tokenizer, "prompt", max_length=policy.max_positions or 2**31)
    asked = [prompt if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
    rows: list[EncodedRow] = []
    for outcome in encoder.encode(list(ListRows(asked, "prompts").rows(Cursor()))):
        if outcome.row is None:
            raise DataError(f"no completion can be drawn for the prompt: {outcome.refused}", place=outcome.place)
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
) -> list[list[Completion]]:
    """Return n completions for each prompt, in the order in which they were drawn; see `PolicyModel.generate`."""
    return Engine(policy, seed=seed).generate(prompt_batch(policy, prompts), n, sampling)
