"""Three ways to compute attention over a packed row's segments, one per kind of device.

A segment's queries see the keys of its prefix (a shared prompt) and then its own, causally; see `layout.Segment`. All three
functions give the same numbers up to rounding:

- `attend_each_segment`: one call of PyTorch's attention per segment; for a CPU.
- `attend_in_padded_rows`: segments as padded rows, in one or two calls; for a GPU without a variable-length kernel, and for many
  small segments on a CPU (`attend_on_cpu` chooses).
- `attend_varlen`: one call of flash-attn's variable-length kernel, or of one with its signature.

What the GPU ways need to know about the segments (where each token goes, which places copy each key) is a plan made once per
forward pass and used by all layers, so the host never waits for the device. The gradients of a prompt's keys and values, which
several responses read, are summed copy by copy in a fixed order, so they are deterministic; the backward pass of PyTorch's
own indexing would sort all indices, or add in any order.

Axes: H query heads, K key-value heads (K divides H), N tokens of the packed row, D head width, M places of padded queries.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlhf_core.models.layout import Segment, Segments

# One call per segment


LARGE_CALL = 2**20
"""Multiplications of queries with keys, padding included, from which on a segment is worth a kernel call of its own on a CPU."""


def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attend segment by segment, one kernel call each, or in padded rows where the calls would cost more than the padding.

    16-bit inputs are computed in float32, which is faster on a CPU, and the result is returned in their dtype. Arguments and
    result: as `attend_each_segment`.
    """
    dtype = value.dtype
    work = segments.cached_plan(_padded_pairs, query.device) * query.shape[1] * query.shape[3]
    small = len(segments) > 2 and work < len(segments) * LARGE_CALL
    attend = attend_in_padded_rows if small else attend_each_segment
    query, key, value = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # autocast would cast down again
        return attend(query, key, value, segments, scale=scale, dropout=dropout).to(dtype)


def _padded_pairs(segments: Segments, device: torch.device) -> int:
    """Return how many pairs of a query and a key padded rows compute."""
    whole = [segment.length for segment in segments if not segment.prefix_length]
    others = [(segment.length, segment.keys) for segment in segments if segment.prefix_length]
    pairs = len(whole) * max(whole, default=0) ** 2
    if others:
        pairs += len(others) * max(length for length, _ in others) * max(keys for _, keys in others)
    return pairs


def attend_each_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attend segment by segment, one kernel call each, without padding and without a mask over the whole row.

    Args:
        query: (1, H, N, D).
        key: (1, K, N, D). value: the same.
        segments: which tokens see which; they cover the row in order.
        scale: factor on the products of queries and keys.
        dropout: probability with which an attention weight is dropped.

    Returns:
        (1, N, H, D) in the dtype of the inputs.
    """
    starts = {segment.start: i for i, segment in enumerate(segments)}
    lengths = [segment.length for segment in segments]
    # `split` has one backward node that concatenates; slices would each write a gradient of the whole row.
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, dropout_p=dropout, enable_gqa=True)
    outputs = []
    for i, segment in enumerate(segments):
        if not segment.prefix_length:
            out = attend(queries[i], keys[i], values[i], is_causal=True)
        else:
            owner = starts[segment.prefix_start]
            prefix = segment.prefix_length
            k = torch.cat([keys[owner][:, :, :prefix], keys[i]], dim=2)
            v = torch.cat([values[owner][:, :, :prefix], values[i]], dim=2)
            out = attend(queries[i], k, v, attn_mask=_suffix_mask(segment, query.device))
        outputs.append(out)
    # Copied once, into the order that some models view as rows.
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1)


def _suffix_mask(segment: Segment, device: torch.device) -> Tensor:
    """Return (length, prefix + length) bool: each token sees the whole prefix, and its segment up to itself."""
    return torch.ones(segment.length, segment.keys, dtype=torch.bool, device=device).tril(segment.prefix_length)


# Indexing whose gradient is summed in a fixed order


@dataclass(frozen=True)
class Copies:
    """Which places of a gathered tensor copy each row of its source (N, ...), for a backward pass that sums in a fixed order."""

    first: Tensor
    """(N,) long: one place that copies each row."""
    rows: Tensor | None = None
    """(n,) long: the rows that are copied more than once; None where there are none."""
    others: Tensor | None = None
    """(n, G) long: their other places, 0 where a row has fewer than G."""
    missing: Tensor | None = None
    """(n, G, 1, 1) bool: True where a row has fewer than G other places."""


class _Gather(torch.autograd.Function):
    """x[index] for rows of x (N, heads, D).

    A row's gradient is the sum over its copies in their order, computed in float32 and rounded once. With `copies` None,
    `index` must name no row twice, and a row that it doesn't name has gradient 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, copies: Copies | None) -> Tensor:
        ctx.index, ctx.copies, ctx.shape = index, copies, x.shape
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x (N, heads, D) for that of x[index] (M, heads, D)."""
        copies: Copies | None = ctx.copies
        if copies is None:
            return upstream.new_zeros(ctx.shape).index_copy_(0, ctx.index, upstream), None, None
        total = upstream.index_select(0, copies.first)
        if copies.rows is not None:
            assert copies.others is not None and copies.missing is not None
            further = upstream.index_select(0, copies.others.flatten()).unflatten(0, copies.others.shape)
            further = further.masked_fill_(copies.missing, 0).sum(1, dtype=torch.float32)  # (n, heads, D)
            together = further.add_(total.index_select(0, copies.rows)).to(total.dtype)
            total.index_copy_(0, copies.rows, together)
        return total, None, None


def gather_rows(x: Tensor, index: Tensor, copies: Copies | None) -> Tensor:
    """Return x[index] for rows of x (N, heads, D), with gradients summed in a fixed order and rounded once; see `Copies`."""
    return _Gather.apply(x, index, copies)


def _gather_both(keys: Tensor, values: Tensor, index: Tensor, copies: Copies | None) -> tuple[Tensor, Tensor]:
    """Return keys[index] and values[index], taken in one operation where the two have one shape."""
    if keys.shape != values.shape:
        return gather_rows(keys, index, copies), gather_rows(values, index, copies)
    taken_keys, taken_values = gather_rows(torch.cat([keys, values], dim=1), index, copies).chunk(2, dim=1)
    return taken_keys, taken_values


def _places(index: Tensor, real: Tensor, tokens: int) -> Tensor:
    """Return (N,) the one place of each token, for `index` (M,), each place's token, and `real` (M,) bool, False at padding."""
    places = torch.empty(tokens, dtype=torch.long)
    places[index[real]] = real.nonzero().squeeze(1)
    return places


def _copies_of(first: Tensor, tokens: Tensor, places: Tensor, device: torch.device) -> Copies:
    """Return the copies of N tokens.

    Args:
        first: (N,) one place that copies each token.
        tokens: (r,) the tokens of further copies. places: (r,) their places.
    """
    if not len(tokens):
        return Copies(first.to(device, non_blocking=True))
    order = tokens.argsort(stable=True)
    rows, counts = tokens.unique(return_counts=True)
    real = torch.arange(int(counts.max())) < counts[:, None]  # (n, G)
    others = torch.zeros(real.shape, dtype=torch.long)
    others[real] = places[order]
    return Copies(
        first.to(device, non_blocking=True),
        rows.to(device, non_blocking=True),
        others.to(device, non_blocking=True),
        ~real[:, :, None, None].to(device, non_blocking=True),
    )


def _token_rows(x: Tensor) -> Tensor:
    """Return (1, heads, N, D) as (N, heads, D), in autocast's dtype where autocast is on: kernels would be given that anyway."""
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    x = x.squeeze(0).transpose(0, 1)  # taking [0] would copy in the backward pass
    return x if x.stride(-1) == 1 else x.contiguous()


# Padded rows


@dataclass(frozen=True)
class _Grid:
    """Segments as padded rows: which packed token is at each place of a (rows, width) table."""

    rows: int
    width: int
    index: Tensor
    """(rows, width) long: the packed token at each place, 0 beyond a row's end."""
    real: Tensor
    """(rows, width) bool: False beyond a row's end."""

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor) -> _Grid:
        """Return one row per segment, for starts and lengths (rows,)."""
        width = int(lengths.max()) if len(lengths) else 0
        steps = torch.arange(width)
        real = steps < lengths[:, None]
        return cls(len(lengths), width, torch.where(real, starts[:, None] + steps, 0), real)


@dataclass(frozen=True)
class PaddedPlan:
    """Which token is at each place of the padded rows: first the segments without a prefix, then those with one."""

    queries: Tensor
    """(M,) long: the token of each query place."""
    keys: Tensor
    """(M',) long: the token of each key place; a segment's prefix comes before the segment."""
    key_copies: Copies
    place: Tensor
    """(N,) long: the query place of each token."""
    whole: tuple[int, int]
    """Rows and width of the segments without a prefix."""
    suffixes: tuple[int, int, int]
    """Rows, width of the queries and width of the keys of the segments with a prefix."""
    visible: Tensor | None
    """(rows, 1, queries, keys) bool: the mask of the segments with a prefix; None without such segments."""

    @classmethod
    def make(cls, segments: Segments, device: torch.device) -> PaddedPlan:
        """Compute the plan on the CPU and copy it to a device, without waiting for it."""
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
            key_copies=_copies_of(own_place, read, by, device),
            place=place.to(device, non_blocking=True),
            whole=(first.rows, first.width),
            suffixes=(own.rows, own.width, len(steps)),
            visible=None if visible is None else visible[:, None].to(device, non_blocking=True),
        )


def attend_in_padded_rows(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attend with the segments as padded rows: two kernel calls, or one where no prompt is shared.

    Only attention is padded; all other layers run on the packed row. Segments without a prefix need no mask, so PyTorch may
    choose its own flash kernel for them. Arguments and result: as `attend_each_segment`.
    """
    plan = segments.cached_plan(PaddedPlan.make, query.device)
    queries, keys, values = (_token_rows(x) for x in (query, key, value))
    queries = gather_rows(queries, plan.queries, Copies(plan.place))
    keys, values = _gather_both(keys, values, plan.keys, plan.key_copies)
    (rows, width), (suffixes, own, seen) = plan.whole, plan.suffixes
    places = rows * width
    outputs = []
    for part, mask, shape in (
        (slice(0, places), None, (rows, width, width)),
        (slice(places, None), plan.visible, (suffixes, own, seen)),
    ):
        if not shape[0]:
            continue
        q = queries[part].unflatten(0, (shape[0], shape[1])).transpose(1, 2)  # (rows, H, width, D)
        k, v = (x[part].unflatten(0, (shape[0], shape[2])).transpose(1, 2) for x in (keys, values))
        outputs.append(_attend(q, k, v, mask, scale, dropout).transpose(1, 2).flatten(0, 1))
    found = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return gather_rows(found, plan.place, None)[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Return PyTorch's attention, (rows, H, queries, D), causal where there is no mask; K key heads serve H query heads."""
    groups = q.shape[1] // k.shape[1]
    # PyTorch's flash kernel takes grouped keys as they are: on a CPU, and in 16 bits, without a mask, on a GPU of capability 8.0.
    on_gpu = mask is None and q.dtype in (torch.bfloat16, torch.float16) and _is_recent(q.device)
    grouped = groups > 1 and (q.device.type == "cpu" or on_gpu)
    if groups > 1 and not grouped:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=grouped
    )


def _is_recent(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


# A variable-length kernel


@dataclass(frozen=True)
class VarlenPlan:
    """The arguments of flash-attn's variable-length kernel that depend on the segments alone."""

    query_starts: Tensor
    """(segments + 1,) int32: where each segment's queries begin, and the end of the last."""
    key_starts: Tensor
    """(segments + 1,) int32: where each segment's keys begin, and the end of the last."""
    keys: Tensor | None
    """(M',) long: the token of each key, a segment's prefix before it; None where no segment has a prefix."""
    key_copies: Copies | None
    longest: tuple[int, int]
    """Most queries and most keys of a segment."""

    @classmethod
    def make(cls, segments: Segments, device: torch.device) -> VarlenPlan:
        """Compute the plan on the CPU and copy it to a device, without waiting for it."""
        ends = torch.tensor([(0, 0), *((s.length, s.keys) for s in segments)]).cumsum(0, dtype=torch.int32)
        keys = copies = None
        if any(s.prefix_length for s in segments):
            tokens = [
                torch.arange(first, first + length)
                for s in segments
                for first, length in ((s.prefix_start, s.prefix_length), (s.start, s.length))
            ]
            lengths = torch.tensor([length for s in segments for length in (s.prefix_length, s.length)])
            own = torch.tensor([False, True]).repeat(len(segments)).repeat_interleave(lengths)
            keys = torch.cat(tokens)
            copies = _copies_of(_places(keys, own, int(own.sum())), keys[~own], (~own).nonzero().squeeze(1), device)
            keys = keys.to(device, non_blocking=True)
        return cls(
            query_starts=ends[:, 0].contiguous().to(device, non_blocking=True),
            key_starts=ends[:, 1].contiguous().to(device, non_blocking=True),
            keys=keys,
            key_copies=copies,
            longest=(max(s.length for s in segments), max(s.keys for s in segments)),
        )


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    dropout: float = 0.0,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attend through a variable-length kernel: one call for all segments, nothing padded.

    Arguments and result: as `attend_each_segment`.

    Args:
        kernel: a function with the signature of `flash_attn.flash_attn_varlen_func`, which None takes. Its causal mask must be
            aligned to the end of the keys.
    """
    attend: Callable[..., Tensor] = kernel or importlib.import_module("flash_attn").flash_attn_varlen_func
    plan = segments.cached_plan(VarlenPlan.make, query.device)
    queries, keys, values = (_token_rows(x) for x in (query, key, value))
    if plan.keys is not None:
        keys, values = _gather_both(keys, values, plan.keys, plan.key_copies)
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
