"""Noise on the embeddings that a model reads while it is trained (NEFTune, Jain et al. 2023, arXiv 2310.05914).

Axes: P prompts with one response each, N tokens of all sequences, W the longest sequence, E the width of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch, on_host
from rlhf_core.models.hidden_states import HiddenStates
from rlhf_core.models.layout import padded_layout
from rlhf_core.models.soft_tokens import with_soft_tokens

if TYPE_CHECKING:
    from rlhf_core.models.sequence_model import SequenceModel


def embedding_noise(seeds: Sequence[int], lengths: Sequence[int], width: int, alpha: float, device: Any) -> Tensor:
    """Return (N, E) float32 noise for sequences laid end to end: alpha / √(L · E) times what is uniform between -1 and 1.

    It depends on a sequence's seed and length alone. L is the sequence's own length, in the paper's code that of its padded
    batch, so that padding and neighbours change nothing.
    """
    parts = []
    for seed, length in zip(seeds, lengths, strict=True):
        generator = torch.Generator(device).manual_seed(seed)
        drawn = torch.rand(length, width, generator=generator, device=device) * 2 - 1
        parts.append(drawn * (alpha / math.sqrt(length * width)))
    return torch.cat(parts)


def noisy_hidden_states(
    model: SequenceModel, batch: Batch, alpha: float, seeds: Tensor, *, drop_last: bool = False
) -> HiddenStates:
    """Return a model's last hidden states of a batch, with noise on the embeddings of all of its tokens; see `embedding_noise`.

    Args:
        seeds: (P,) long, one per prompt.
        drop_last: as of `SequenceModel.hidden_states`.

    Raises:
        ValueError: a prompt has more than one response, which would share its noise.
    """
    if not torch.equal(on_host(batch.owner), torch.arange(batch.num_prompts)):
        raise ValueError("noise on embeddings needs one response per prompt, in the order of the prompts")
    if not batch.num_responses:
        return model.hidden_states(batch, drop_last=drop_last)
    lengths = batch.prompt_lengths + batch.response_lengths  # (P,)
    steps = torch.arange(batch.longest, device=batch.device)
    ids = padded_layout(batch).input_ids[steps < lengths[:, None]]  # (N,), sequence by sequence
    rows = model.network.get_input_embeddings()(ids[None])[0]
    host = on_host(lengths).tolist()
    rows = rows + embedding_noise(on_host(seeds).tolist(), host, rows.shape[1], alpha, rows.device).to(rows.dtype)
    starts = lengths.cumsum(0) - lengths
    with with_soft_tokens(model.network, rows) as first:
        noisy = replace(
            batch,
            prompt_ids=_numbered(first + starts, batch.prompt_lengths, batch.prompt_ids),
            response_ids=_numbered(first + starts + batch.prompt_lengths, batch.response_lengths, batch.response_ids),
        )
        states = model.hidden_states(noisy, drop_last=drop_last)
    return replace(states, batch=batch)


def _numbered(first: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    """Return a table of ids of the shape of `like` that count up from `first` in each row, and are 0 beyond the row's length."""
    steps = torch.arange(like.shape[1], device=like.device)
    return torch.where(steps < lengths[:, None], first[:, None] + steps, 0)
