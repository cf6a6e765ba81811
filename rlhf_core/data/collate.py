"""Encoded rows → one `Batch`, padded on the right; lengths, not ids, tell padding from tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.data.encoder import EncodedRow


def collate(rows: Sequence[EncodedRow]) -> Batch:
    """Return a batch of these rows: prompt ids (P, L); response ids and loss mask (R, T), in the order of their prompts.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    responses = [response for row in rows for response in row.responses]
    masks = [mask for row in rows for mask in row.masks]
    prompt_ids, prompt_lengths = _padded([row.prompt_ids for row in rows], np.int64)
    response_ids, response_lengths = _padded(responses, np.int64)
    loss_mask, _ = _padded(masks, np.bool_)
    return Batch(
        prompt_ids=prompt_ids,
        prompt_lengths=prompt_lengths,
        response_ids=response_ids,
        response_lengths=response_lengths,
        owner=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(row.responses) for row in rows])),
        loss_mask=loss_mask,
        rows=tuple(row.index for row in rows),
        per_prompt={name: torch.tensor([row.per_prompt[name] for row in rows]) for name in rows[0].per_prompt},
        per_response={
            name: torch.tensor([value for row in rows for value in row.per_response[name]])
            for name in rows[0].per_response
        },
        prompts=tuple(row.prompt for row in rows),
        records=tuple(row.record for row in rows),
    )


def _padded(sequences: Sequence[Sequence[int]], dtype: type[np.generic]) -> tuple[Tensor, Tensor]:
    """Return sequences as a table (N, longest) padded with zeros, and their lengths (N,)."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    table = np.zeros((len(sequences), int(lengths.max(initial=0))), dtype=dtype)
    for line, sequence in zip(table, sequences, strict=True):
        line[: len(sequence)] = sequence
    return torch.from_numpy(table), torch.from_numpy(lengths)
