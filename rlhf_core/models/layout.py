"""How a batch is laid out for one forward pass: packed end to end with shared prompts, or one padded row per response.

Packed: every real token is once in a single row. A prompt is followed directly by its first response, the two being one
causal sequence; each further response of that prompt is a segment that sees the prompt's keys and values and then itself.
Positions count as if each response were alone behind its prompt, so hidden states equal those of separate rows.

Axes: R responses, T response tokens, N tokens of the packed row, W width of padded rows, D width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch, on_host, to_device

PlanT = TypeVar("PlanT")


@dataclass(frozen=True)
class Segment:
    """`length` query tokens from `start` on, which see `prefix_length` tokens from `prefix_start` on, and themselves causally."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def keys(self) -> int:
        """Number of keys that the last token sees."""
        return self.prefix_length + self.length


class Segments(tuple[Segment, ...]):
    """The segments that cover a packed row in order, and the plans that attention kernels make from them once for all layers."""

    def cached_plan(self, make: Callable[[Segments, torch.device], PlanT], device: torch.device) -> PlanT:
        """Return `make(self, device)`, made once: later calls return the same object."""
        plans: dict[Any, Any] = self.__dict__.setdefault("plans", {})
        key = (make, device)
        if key not in plans:
            plans[key] = make(self, device)
        return plans[key]


class AttentionOverCache(Protocol):
    """Attention of a packed row's tokens to keys and values that were kept from earlier forward passes, and to themselves."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Return the attention (1, N, H, D) of a layer, for queries (1, H, N, D) and keys and values (1, K, N, D)."""
        ...


@dataclass(frozen=True)
class Layout:
    """Model inputs for a batch, and which of the hidden states, flattened to (rows × width, D), belong to each response."""

    input_ids: Tensor
    """(1, N) packed, or (R, W) padded."""
    position_ids: Tensor | None
    """Of the shape of `input_ids` where packed; None where padded: the model then counts positions itself."""
    attention_mask: Tensor | None
    """(R, W) where padded; None where packed, or for a single row."""
    segments: Segments | AttentionOverCache | None
    """Which tokens see which, where packed; None where padded."""
    at: Tensor | None
    """(R, T) long: flat index of the hidden state at each response token, 0 beyond a response's end; None where last tokens were
    left out."""
    before: Tensor
    """(R, T) long: flat index of the hidden state that predicts each response token; 0 beyond a response's end."""
    prompt_end: Tensor
    """(R,) long: flat index of the hidden state at the last token of each response's prompt."""

    @property
    def num_positions(self) -> int:
        """Number of positions that the model computes, padding included."""
        return self.input_ids.numel()


def packed_layout(batch: Batch, *, share_prompts: bool = True, drop_last: bool = False) -> Layout:
    """Lay a batch out in one row without padding.

    Args:
        share_prompts: whether each prompt is in the row once, or once per response.
        drop_last: leave out the last token of each response: its state predicts nothing that is scored.
    """
    prompt_lengths, response_lengths, owner = (
        on_host(tensor).tolist() for tensor in (batch.prompt_lengths, batch.response_lengths, batch.owner)
    )
    width = batch.response_ids.shape[1]
    ids, positions, segments = [], [], []
    at_start = []
    before_first = []
    prompts_at: dict[int, int] = {}
    used = 0
    order = sorted(range(len(owner)), key=owner.__getitem__) if share_prompts else range(len(owner))
    for response in order:
        prompt = owner[response]
        prefix = prompt_lengths[prompt]
        length = response_lengths[response] - (1 if drop_last and response_lengths[response] else 0)
        own = batch.response_ids[response, :length]
        if share_prompts and prompt in prompts_at:
            start = prompts_at[prompt]
            if length:
                segments.append(Segment(used, length, start, prefix))
            ids.append(own)
            at_start.append((response, used))
            before_first.append((response, start + prefix - 1))
            positions.append((prefix, length))
            used += length
        else:
            prompts_at[prompt] = used
            segments.append(Segment(used, prefix + length))
            ids.extend((batch.prompt_ids[prompt, :prefix], own))
            at_start.append((response, used + prefix))
            before_first.append((response, used + prefix - 1))
            positions.append((0, prefix + length))
            used += prefix + length
    device = batch.device
    starts = to_device(torch.tensor([start for _, start in sorted(at_start)], dtype=torch.long), device)
    firsts = to_device(torch.tensor([first for _, first in sorted(before_first)], dtype=torch.long), device)
    counted = torch.cat([torch.arange(first, first + length) for first, length in positions])
    steps = torch.arange(width, device=device)
    inside = steps < batch.response_lengths[:, None]  # (R, T)
    at = starts[:, None] + steps
    before = torch.where(steps == 0, firsts[:, None], at - 1)
    return Layout(
        input_ids=torch.cat(ids)[None],
        position_ids=to_device(counted, device)[None],
        attention_mask=None,
        segments=Segments(segments),
        at=None if drop_last else torch.where(inside, at, 0),
        before=torch.where(inside, before, 0),
        prompt_end=firsts,
    )


def padded_layout(batch: Batch) -> Layout:
    """Lay a batch out with one right-padded row per response, behind a copy of its prompt: nearly any model accepts this.

    A single response needs no padding, and no mask.
    """
    prompt_lengths = batch.prompt_lengths[batch.owner]  # (R,)
    lengths = prompt_lengths + batch.response_lengths
    width = batch.longest
    columns = torch.arange(width, device=batch.device)
    real = columns < lengths[:, None]  # (R, W)
    in_prompt = columns < prompt_lengths[:, None]
    offset = (columns - prompt_lengths[:, None]).clamp(min=0)
    prompt_part = batch.prompt_ids[batch.owner].gather(
        1, columns.clamp(max=batch.prompt_ids.shape[1] - 1).expand(len(lengths), -1)
    )
    response_part = batch.response_ids.gather(1, offset.clamp(max=batch.response_ids.shape[1] - 1))
    ids = torch.where(in_prompt, prompt_part, response_part)
    steps = torch.arange(batch.response_ids.shape[1], device=batch.device)
    inside = steps < batch.response_lengths[:, None]  # (R, T)
    at = torch.arange(len(lengths), device=batch.device)[:, None] * width + prompt_lengths[:, None] + steps
    return Layout(
        # Id 0 as padding: nothing attends to it and nothing reads its state.
        input_ids=torch.where(real, ids, 0),
        # The model counts positions itself: some begin at another number than 0.
        position_ids=None,
        attention_mask=real.long() if len(lengths) > 1 else None,
        segments=None,
        at=torch.where(inside, at, 0),
        before=torch.where(inside, at - 1, 0),
        prompt_end=torch.arange(len(lengths), device=batch.device) * width + prompt_lengths - 1,
    )


def empty_layout(batch: Batch) -> Layout:
    """Return the layout of a batch without responses, which needs no forward pass."""
    nowhere = torch.zeros(0, batch.response_ids.shape[1], dtype=torch.long, device=batch.device)
    return Layout(
        input_ids=nowhere.new_zeros(1, 0),
        position_ids=None,
        attention_mask=None,
        segments=None,
        at=nowhere,
        before=nowhere,
        prompt_end=nowhere.new_zeros(0),
    )


def of_responses(batch: Batch, responses: Tensor) -> Batch:
    """Return a batch with some of the responses and all prompts, without its further columns.

    Args:
        responses: (R',) long, indices.
    """
    return replace(
        batch,
        response_ids=batch.response_ids[responses],
        response_lengths=batch.response_lengths[responses],
        owner=batch.owner[responses],
        loss_mask=batch.loss_mask[responses],
        per_response={},
        per_token={},
    )


def joined(layouts: Sequence[Layout], responses: Sequence[Tensor]) -> Layout:
    """Return one layout for several forward passes whose hidden states are concatenated.

    Args:
        layouts: one per forward pass.
        responses: for each, the indices (R',) of its responses; together they are all R.
    """
    order = torch.cat(list(responses)).argsort()
    starts = [0]
    for layout in layouts:
        starts.append(starts[-1] + layout.num_positions)

    def together(parts: list[Tensor]) -> Tensor:
        return torch.cat([part + start for part, start in zip(parts, starts, strict=False)])[order]

    at = [layout.at for layout in layouts if layout.at is not None]
    return Layout(
        input_ids=torch.cat([layout.input_ids.flatten() for layout in layouts])[None],
        position_ids=None,
        attention_mask=None,
        segments=None,
        at=together(at) if at else None,
        before=together([layout.before for layout in layouts]),
        prompt_end=together([layout.prompt_end for layout in layouts]),
    )
