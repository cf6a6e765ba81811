"""Attention over segments on a GPU: a few kernels a layer, none of which the host waits for.

What kernels need to know of the segments (which token goes where, who reads it) is worked out once for all layers of a forward
pass. Gradients of a prompt's keys and values, which several responses read, are added up reader by reader, in one order, where
PyTorch's own backward pass of indexing sorts all indices, or adds in any order. Axes as in `attention`; M padded places.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlhf_core.models.layout import Segments


@dataclass(frozen=True)
class Readers:
    """Who reads each row of (N, ...): one place each, and of some rows further ones."""

    first: Tensor
    """(N,): a place that reads each row."""
    rows: Tensor | None = None
    """(n,): rows that have further readers; None where there are none."""
    others: Tensor | None = None
    """(n, G): their places, 0 where a row has fewer than G."""
    missing: Tensor | None = None
    """(n, G, 1, 1) bool: where it has fewer."""


class _Take(torch.autograd.Function):
    """x[index] for rows of x (N, heads, D).

    A row's gradient is the sum over its readers, in their order, in float32 and rounded once. Without readers, `index` names no
    row twice, and a row that it doesn't name gets zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, readers: Readers | None) -> Tensor:
        ctx.index, ctx.readers, ctx.shape = index, readers, x.shape
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        readers: Readers | None = ctx.readers
        if readers is None:
            return upstream.new_zeros(ctx.shape).index_copy_(0, ctx.index, upstream), None, None
        total = upstream.index_select(0, readers.first)
        if readers.rows is not None:
            assert readers.others is not None and readers.missing is not None
            further = upstream.index_select(0, readers.others.flatten()).unflatten(0, readers.others.shape)
            further = further.masked_fill_(readers.missing, 0).sum(1, dtype=torch.float32)  # (n, heads, D)
            together = further.add_(total.index_select(0, readers.rows)).to(total.dtype)
            total.index_copy_(0, readers.rows, together)
        return total, None, None


def _take_both(keys: Tensor, values: Tensor, index: Tensor, readers: Readers | None) -> tuple[Tensor, Tensor]:
    """Take rows of both, side by side where they fit: half as many operations, most of them in the backward pass."""
    if keys.shape != values.shape:
        return _Take.apply(keys, index, readers), _Take.apply(values, index, readers)
    taken_keys, taken_values = _Take.apply(torch.cat([keys, values], dim=1), index, readers).chunk(2, dim=1)
    return taken_keys, taken_values


@dataclass(frozen=True)
class _Grid:
    """Segments in padded rows, (rows, width)."""

    rows: int
    width: int
    index: Tensor
    """(rows, width): the packed token at each place, 0 beyond a row's end."""
    real: Tensor
    """(rows, width) bool."""

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor) -> _Grid:
        width = int(lengths.max()) if len(lengths) else 0
        steps = torch.arange(width)
        real = steps < lengths[:, None]
        return cls(len(lengths), width, torch.where(real, starts[:, None] + steps, 0), real)


@dataclass(frozen=True)
class PaddedPlan:
    """Where tokens stand in padded rows: first the segments without a prefix, then those with one."""

    queries: Tensor
    """(M,): the token of each query's place."""
    keys: Tensor
    """(M',): the token of each key's place; a segment's prefix stands before it."""
    key_readers: Readers
    place: Tensor
    """(N,): the query's place of each token."""
    whole: tuple[int, int]
    """Rows and width of the segments without a prefix."""
    suffixes: tuple[int, int, int]
    """Rows, width of queries and width of keys of those with one."""
    visible: Tensor | None
    """(rows, 1, queries, keys) bool, for the segments with a prefix."""

    @classmethod
    def make(cls, segments: Segments, device: torch.device) -> PaddedPlan:
        facts = torch.tensor([(s.start, s.length, s.prefix_start, s.prefix_length) for s in segments])
        with_prefix = facts[:, 3] > 0
        whole, (starts, lengths, prefix_starts, prefixes) = facts[~with_prefix], facts[with_prefix].unbind(1)
        first = _Grid.of(whole[:, 0], whole[:, 1])
        own = _Grid.of(starts, lengths)
        # Keys of the segments with a prefix: the prefix, then the segment itself.
        steps = torch.arange(int((prefixes + lengths).max()) if len(starts) else 0)
        in_prefix = steps < prefixes[:, None]
        real = steps < (prefixes + lengths)[:, None]
        keys = torch.where(in_prefix, prefix_starts[:, None], starts[:, None] - prefixes[:, None]) + steps
        keys = torch.where(real, keys, 0)
        tokens, before = int(facts[:, 1].sum()), first.index.numel()
        queries = torch.cat([first.index.flatten(), own.index.flatten()])
        place = _places(queries, torch.cat([first.real.flatten(), own.real.flatten()]), tokens)
        all_keys = torch.cat([first.index.flatten(), keys.flatten()])
        own_place = _places(all_keys, torch.cat([first.real.flatten(), (real & ~in_prefix).flatten()]), tokens)
        read, by = keys[in_prefix], before + in_prefix.flatten().nonzero().squeeze(1)
        visible = steps <= prefixes[:, None, None] + torch.arange(own.width)[:, None] if len(starts) else None
        return cls(
            queries=queries.to(device, non_blocking=True),
            keys=all_keys.to(device, non_blocking=True),
            key_readers=_readers(own_place, read, by, device),
            place=place.to(device, non_blocking=True),
            whole=(first.rows, first.width),
            suffixes=(own.rows, own.width, len(steps)),
            visible=None if visible is None else visible[:, None].to(device, non_blocking=True),
        )


def _places(index: Tensor, real: Tensor, tokens: int) -> Tensor:
    """Return (N,) the place at which each token really stands, of which there is one."""
    places = torch.empty(tokens, dtype=torch.long)
    places[index[real]] = real.nonzero().squeeze(1)
    return places


def _readers(first: Tensor, tokens: Tensor, places: Tensor, device: torch.device) -> Readers:
    """Return the readers of tokens: one place of each, and further pairs of a token and a place."""
    if not len(tokens):
        return Readers(first.to(device, non_blocking=True))
    order = tokens.argsort(stable=True)
    rows, counts = tokens.unique(return_counts=True)
    real = torch.arange(int(counts.max())) < counts[:, None]  # (n, G)
    others = torch.zeros(real.shape, dtype=torch.long)
    others[real] = places[order]
    return Readers(
        first.to(device, non_blocking=True),
        rows.to(device, non_blocking=True),
        others.to(device, non_blocking=True),
        ~real[:, :, None, None].to(device, non_blocking=True),
    )


def padded_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attend in padded rows: what `attention.segment_attention` computes, in two kernel calls, or one where no prompt is shared.

    The choice on a GPU where no variable-length kernel runs, and a call a segment would leave it idle. Only attention is padded;
    all other layers run on the packed row. Segments without a prefix need no mask, so PyTorch may take its own flash kernel.
    """
    plan = segments.plan(PaddedPlan.make, query.device)
    queries, keys, values = (_rows(x) for x in (query, key, value))
    queries = _Take.apply(queries, plan.queries, Readers(plan.place))
    keys, values = _take_both(keys, values, plan.keys, plan.key_readers)
    (rows, width), (suffixes, own, seen) = plan.whole, plan.suffixes
    cut = rows * width
    outputs = []
    for part, mask, shape in (
        (slice(0, cut), None, (rows, width, width)),
        (slice(cut, None), plan.visible, (suffixes, own, seen)),
    ):
        if not shape[0]:
            continue
        q = queries[part].unflatten(0, (shape[0], shape[1])).transpose(1, 2)  # (rows, H, width, D)
        k, v = (x[part].unflatten(0, (shape[0], shape[2])).transpose(1, 2) for x in (keys, values))
        outputs.append(_attend(q, k, v, mask, scale, dropout).transpose(1, 2).flatten(0, 1))
    found = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _Take.apply(found, plan.place, None)[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    # PyTorch's flash kernel takes grouped keys as they are: in 16 bits, without a mask, on a GPU of capability 8.0.
    grouped = groups > 1 and mask is None and q.dtype in (torch.bfloat16, torch.float16) and _is_recent(q.device)
    if groups > 1 and not grouped:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=grouped
    )


def _is_recent(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _rows(x: Tensor) -> Tensor:
    """Return (1, heads, N, D) as (N, heads, D), in autocast's precision where it is on, which kernels would be given anyway."""
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    x = x.squeeze(0).transpose(0, 1)  # taking [0] would copy in the backward pass
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class VarlenPlan:
    """What flash-attn's variable-length kernel wants to know."""

    query_starts: Tensor
    key_starts: Tensor
    """(segments + 1,) int32, where each segment's queries and keys begin."""
    keys: Tensor | None
    """(M',): the token of each key, a segment's prefix before it; None where no segment has one."""
    key_readers: Readers | None
    longest: tuple[int, int]
    """Most queries and keys of a segment."""

    @classmethod
    def make(cls, segments: Segments, device: torch.device) -> VarlenPlan:
        ends = torch.tensor([(0, 0), *((s.length, s.keys) for s in segments)]).cumsum(0, dtype=torch.int32)
        keys = readers = None
        if any(s.prefix_length for s in segments):
            tokens = [
                torch.arange(first, first + length)
                for s in segments
                for first, length in ((s.prefix_start, s.prefix_length), (s.start, s.length))
            ]
            lengths = torch.tensor([length for s in segments for length in (s.prefix_length, s.length)])
            own = torch.tensor([False, True]).repeat(len(segments)).repeat_interleave(lengths)
            keys = torch.cat(tokens)
            readers = _readers(_places(keys, own, int(own.sum())), keys[~own], (~own).nonzero().squeeze(1), device)
            keys = keys.to(device, non_blocking=True)
        return cls(
            query_starts=ends[:, 0].contiguous().to(device, non_blocking=True),
            key_starts=ends[:, 1].contiguous().to(device, non_blocking=True),
            keys=keys,
            key_readers=readers,
            longest=(max(s.length for s in segments), max(s.keys for s in segments)),
        )


def flash_segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    dropout: float = 0.0,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The same through flash-attn's variable-length kernel, or one with its arguments.

    Its causal mask is aligned to the end of the keys, and heads' values must lie side by side, as they do here.
    """
    attend: Callable[..., Tensor] = kernel or importlib.import_module("flash_attn").flash_attn_varlen_func
    plan = segments.plan(VarlenPlan.make, query.device)
    queries, keys, values = (_rows(x) for x in (query, key, value))
    if plan.keys is not None:
        keys, values = _take_both(keys, values, plan.keys, plan.key_readers)
    return attend(
        queries,
        keys,
        values,
        plan.query_starts,
        plan.key_starts,
        *plan.longest,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
    )[None]
