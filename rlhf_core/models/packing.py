"""Whether a model computes packed rows as it computes padded ones, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlhf_core.batch import Batch
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.layout import Layout, packed_layout, padded_layout


@torch.no_grad()
def packing_obstacle(forward: Callable[[Layout], Tensor], backbone: nn.Module, *, vocabulary: int) -> str | None:
    """Compare packed with padded hidden states on a few tokens; return how they differ, None where they agree.

    Linear attention, convolutions and position biases mix tokens in ways that leak between packed sequences.

    Args:
        forward: hidden states of a layout, flattened to (N, D).
        backbone: the model underneath; it is put into evaluation mode and back.
        vocabulary: how many token ids there are.
    """
    example = next(backbone.parameters())
    ids = torch.arange(24, device=example.device).remainder(vocabulary)
    lengths = torch.tensor([4, 2, 3], device=example.device)
    probe = Batch(
        prompt_ids=ids[:10].view(2, 5),
        prompt_lengths=torch.tensor([5, 3], device=example.device),
        response_ids=ids[12:24].view(3, 4),
        response_lengths=lengths,
        owner=torch.tensor([0, 0, 1], device=example.device),
        loss_mask=torch.arange(4, device=example.device) < lengths[:, None],
        rows=(0, 1),
    )
    try:
        with evaluating(backbone), torch.autocast(example.device.type, enabled=False):
            packed, padded = packed_layout(probe), padded_layout(probe)
            assert packed.at is not None and padded.at is not None
            ours = forward(packed)[packed.at[probe.loss_mask]].float()
            theirs = forward(padded)[padded.at[probe.loss_mask]].float()
    except (TypeError, ValueError, RuntimeError, KeyError) as failure:
        return f"{type(failure).__name__}: {failure}"
    error = float((ours - theirs).norm() / theirs.norm())
    limit = 1e-4 if example.dtype == torch.float32 else 3e-2
    return None if error < limit else f"relative difference {error:.1e}"
