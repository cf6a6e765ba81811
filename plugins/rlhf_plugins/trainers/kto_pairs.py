"""KTO's mismatched pairs: responses behind prompts that they don't answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rlhf_core.plugin import Batch


def mismatched(batch: Batch, prompts: Sequence[Sequence[int] | None], max_length: int) -> Batch:
    """Return the batch's responses behind other prompts, cut to `max_length` with them; rows without another are left out.

    Args:
        prompts: for each prompt of the batch, the ids of the one that stands in for it.
    """
    kept = [number for number, prompt in enumerate(prompts) if prompt is not None]
    part = batch.select(kept)
    others = [torch.tensor(prompts[number]) for number in kept]
    prompt_lengths = torch.tensor([len(ids) for ids in others], dtype=torch.long, device=batch.device)
    room = (max_length - prompt_lengths[part.owner]).clamp(min=1)
    lengths = torch.minimum(part.response_lengths, room)
    inside = torch.arange(part.response_ids.shape[1], device=batch.device) < lengths[:, None]
    padded = torch.nn.utils.rnn.pad_sequence(others, batch_first=True) if others else part.prompt_ids
    return replace(
        part,
        prompt_ids=padded.to(batch.device),
        prompt_lengths=prompt_lengths,
        response_lengths=lengths,
        loss_mask=part.loss_mask & inside,
    )
