"""Attention over sequences in a `PagedKVCache`: what reaches a transformers model's layers in place of a mask.

Two shapes of work. In a decoding step each sequence has one new token, or a few where a draft is verified: `DecodingAttention`
reads each block of the cache once for all new tokens that see it, whether it is a prompt that many completions share or a
sequence's own, in a few matrix products over all blocks at once, with one softmax over all blocks of a token. While prompts are
read, or given tokens are scored, a sequence has many new tokens: `ChunkAttention` attends sequence by sequence.

Axes: R rows, one per new token, X blocks, M rows that see one block, H query heads, K key-value heads, G = H / K, D head width,
S places of a block.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_core.generation.paged_cache import BlockView, CachedSequence, PagedKVCache
from rlhf_core.models.fast_linears import product_dtype

HOLES = 2.0
"""A class's blocks are read as one range of the pool where, per block, at most so many others lie in it, divided by the rows that
see a block: those others are read and worked on in vain, while blocks that are chosen are copied together first."""
LOG2_E = math.log2(math.e)
"""Scores are taken to base 2: PyTorch calls another library for e^x on a CPU, which is slow where little is left of x."""
LOWEST = -1e30
"""Score of a place that a row doesn't see: finite, so that rows which see nothing of a block make no NaN."""


class CachedAttention:
    """Attention of new tokens to cached ones and to themselves; their keys and values are written into the cache first.

    Args:
        sequences: with places for the new tokens appended.
        counts: new tokens of each sequence, at least 1.
    """

    def __init__(self, cache: PagedKVCache, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        self.cache, self.sequences, self.counts = cache, sequences, counts
        found = [one.places(one.length - count, one.length) for one, count in zip(sequences, counts, strict=True)]
        self.blocks, self.places = (np.concatenate(part) for part in zip(*found, strict=True))
        self._index: dict[int, Tensor] = {}

    def write(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values (1, K, N, D), and return the layer's pools."""
        heads = key.shape[1]
        if heads not in self._index:
            self._index[heads] = self.cache.index_of(self.blocks, self.places, heads)
        return self.cache.write(module, self._index[heads], key[0].transpose(0, 1), value[0].transpose(0, 1))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Return the attention (1, N, H, D) of an attention layer for its new tokens, in the values' dtype.

        Autocast leaves queries and keys in float32 behind a rotary embedding; keys are rounded to the values' dtype, in which
        they are kept.

        Args:
            module: the layer, which tells its keys and values from those of others.
            query: (1, H, N, D). key: (1, K, N, D). value: the same.
            scale: factor on the products of queries and keys.
        """
        with torch.autocast(query.device.type, enabled=False):
            key = key.to(value.dtype)
            pools = self.write(module, key, value)
            return self._attend(module, query, key, value, pools, scale).to(value.dtype)

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pools: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        """Return (1, N, H, D), given the layer's keys and values in the cache; see `attend`."""
        raise NotImplementedError


class ChunkAttention(CachedAttention):
    """Several new tokens per sequence: each sees what its sequence has in the cache, and the new tokens up to itself."""

    @cached_property
    def _seen(self) -> list[tuple[list[BlockView], Tensor | None]]:
        """For each sequence its blocks and the mask of its new tokens; none where all its tokens are new."""
        return [
            (list(one.views()), _behind(one.length - count, count, self.cache.device))
            if one.length > count
            else ([], None)
            for one, count in zip(self.sequences, self.counts, strict=True)
        ]

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pools: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        outputs, start = [], 0
        # On a CPU 16-bit products with a mask are slower than those in float32.
        dtype = torch.float32 if query.device.type == "cpu" else value.dtype
        for (views, mask), count in zip(self._seen, self.counts, strict=True):
            part = slice(start, start + count)
            k, v = self.cache.read(module, views) if views else (key[0, :, part], value[0, :, part])
            found = F.scaled_dot_product_attention(
                query[:, :, part].to(dtype), k[None].to(dtype), v[None].to(dtype),
                attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
            )  # fmt: skip
            outputs.append(found.transpose(1, 2))
            start += count
        return torch.cat(outputs, dim=1)


def _behind(before: int, count: int, device: torch.device) -> Tensor:
    """Return (count, before + count) bool: each of some tokens sees all before them, and them up to itself."""
    return torch.ones(count, before + count, dtype=torch.bool, device=device).tril(before)


@dataclass
class _Class:
    """Blocks that up to M rows see each."""

    blocks: Tensor | slice
    """(X,) long, or the range that they are."""
    rows: Tensor
    """(X, M) long: the rows that see each block; R where a block has fewer than M."""
    hidden: Tensor
    """(X, M, S) float32: 0 where a row sees a place, else `LOWEST`."""
    of_row: dict[int, int] = field(default_factory=dict)
    """Block → its index among X."""


class _Lines:
    """What a step does at once for the blocks of all classes: a line for each block, row that sees it, and query head.

    Lines of a class lie together, in the order (X, K, M, G), so that its scores are one batch of matrix products.

    Args:
        kept: K. group: G.
    """

    def __init__(self, classes: Sequence[_Class], kept: int, group: int) -> None:
        heads = torch.arange(kept, device=classes[0].rows.device)[:, None]
        self.at = torch.cat([(one.rows[:, None] * kept + heads).flatten() for one in classes])
        """(L / G,) long: where the G lines of a key-value head lie among (R + 1) · K."""
        self.hidden = torch.cat(
            [one.hidden[:, None, :, None].expand(-1, kept, -1, group, -1).flatten(0, -2) for one in classes]
        )
        """(L, S) float32: as of a class."""
        self.shapes = [(len(one.rows) * kept, one.rows.shape[1] * group) for one in classes]
        """(X · K, M · G) of each class."""

    def of_classes(self, lines: Tensor) -> list[Tensor]:
        """Return the views (X · K, M · G, …) of each class's lines."""
        parts = lines.split([products * rows for products, rows in self.shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]

    def show(self, blocks: int, index: Tensor, places: Tensor) -> None:
        """Let the one row that sees each of some blocks (n,) of the first class, of so many, see one more place (n,) of it."""
        self.of_classes(self.hidden)[0].view(blocks, -1, self.hidden.shape[1])[index, :, places] = 0


class DecodingAttention(CachedAttention):
    """One or a few new tokens per sequence, each a row of a decoding step; for a CPU, where it is matrix products.

    Made for a set of sequences with one new token each, `step` moves on to their next tokens, and is cheap as long as none begins
    a block.

    Args:
        counts: new tokens of each sequence; None takes one of each.
    """

    def __init__(
        self, cache: PagedKVCache, sequences: Sequence[CachedSequence], counts: Sequence[int] | None = None
    ) -> None:
        super().__init__(cache, sequences, [1] * len(sequences) if counts is None else counts)
        self._rows = sum(self.counts)
        self._classes = self._classify()
        self._lines: dict[tuple[int, int], _Lines] = {}  # layers of a model may differ in their heads

    def step(self) -> bool:
        """Move on to each sequence's next token, for which a place was appended; return False where a new plan is needed.

        Only where each has one new token.
        """
        size = self.cache.block_size
        stretches = [one.stretch for one in self.sequences]
        places = np.fromiter((own.length - 1 for own in stretches), dtype=np.int64, count=len(stretches))
        if (places % size == 0).any():
            return False
        blocks = np.fromiter((own.blocks[-1] for own in stretches), dtype=np.int64, count=len(stretches))
        if not np.array_equal(blocks, self.blocks):
            return False
        self.places = places % size
        self._index.clear()
        own = self._classes[0]
        at = torch.from_numpy(np.fromiter((own.of_row[block] for block in blocks.tolist()), np.int64, len(stretches)))
        places_at = torch.from_numpy(self.places)
        own.hidden[at, 0, places_at] = 0
        for lines in self._lines.values():
            lines.show(len(own.rows), at, places_at)
        return True

    def _classify(self) -> list[_Class]:
        """Sort all blocks that rows see by how many rows see them, to the next power of two; rows' own blocks come first."""
        seen: defaultdict[int, list[tuple[int, int]]] = defaultdict(
            list
        )  # block → (row, tokens of it that the row sees)
        row = 0
        for sequence, count in zip(self.sequences, self.counts, strict=True):
            # A new token sees those before it and itself, of the new ones behind it none.
            begin, whole = 0, sequence.length - count + 1
            for view in sequence.views():
                for k in range(count):
                    if (tokens := min(view.tokens, whole + k - begin)) > 0:
                        seen[view.block].append((row + k, tokens))
                begin += view.tokens
            row += count
        classes: defaultdict[int, list[int]] = defaultdict(list)
        for block, rows in seen.items():
            classes[1 << (len(rows) - 1).bit_length()].append(block)
        return [self._class(width, sorted(classes[width]), seen) for width in sorted(classes)]

    def _class(self, width: int, blocks: list[int], seen: dict[int, list[tuple[int, int]]]) -> _Class:
        device, rows = self.cache.device, self._rows
        own, span = set(blocks), blocks[-1] - blocks[0] + 1
        if span <= (1 + HOLES / width) * len(blocks):
            # A range is read where it is, while chosen blocks would be copied together, in each layer and step.
            blocks = list(range(blocks[0], blocks[0] + span))
        together = span == len(blocks)
        index = np.full((len(blocks), width), rows, dtype=np.int64)
        tokens = np.zeros((len(blocks), width), dtype=np.int64)
        for at, block in enumerate(blocks):
            for k, (row, count) in enumerate(seen[block] if block in own else ()):
                index[at, k], tokens[at, k] = row, count
        hidden = np.where(np.arange(self.cache.block_size) < tokens[:, :, None], 0, LOWEST).astype(np.float32)
        return _Class(
            blocks=slice(blocks[0], blocks[-1] + 1) if together else torch.tensor(blocks, device=device),
            rows=torch.from_numpy(index).to(device),
            hidden=torch.from_numpy(hidden).to(device),
            of_row={block: at for at, block in enumerate(blocks) if block in own} if width == 1 else {},
        )

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pools: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        keys, values = pools
        heads, rows, width = query.shape[1:]
        kept, out_width = key.shape[1], value.shape[3]
        group = heads // kept
        if (kept, group) not in self._lines:
            self._lines[kept, group] = _Lines(self._classes, kept, group)
        lines = self._lines[kept, group]
        # ((R + 1) · K, G · D); the last row is for those that a block lacks.
        queries = torch.zeros(((rows + 1) * kept, group * width), dtype=keys.dtype, device=query.device)
        torch.mul(query[0].transpose(0, 1), scale * LOG2_E, out=queries[:-kept].view(rows, heads, width))
        # Only the products are worked out class by class: at a few microseconds an operation, softmaxes of each took longer.
        dtype = product_dtype(keys.dtype) if keys.device.type == "cpu" else keys.dtype
        q = queries.index_select(0, lines.at).view(-1, width).to(dtype)
        scores = torch.empty((len(q), self.cache.block_size), dtype=dtype, device=query.device)
        for one, each, product in zip(self._classes, lines.of_classes(q), lines.of_classes(scores), strict=True):
            torch.bmm(each, keys[one.blocks].flatten(0, 1).to(dtype).transpose(1, 2), out=product)
        scores = scores.float().add_(lines.hidden)
        most = torch.full(((rows + 1) * kept, group), LOWEST, device=query.device)
        most.scatter_reduce_(0, lines.at[:, None].expand(-1, group), scores.amax(-1).view(-1, group), "amax")
        weights = scores.sub_(most.index_select(0, lines.at).view(-1, 1)).exp2_()
        total = torch.zeros_like(most).index_add_(0, lines.at, weights.sum(-1).view(-1, group))
        weights = weights.to(dtype)
        found = torch.empty((len(q), out_width), dtype=dtype, device=query.device)
        for one, each, product in zip(self._classes, lines.of_classes(weights), lines.of_classes(found), strict=True):
            torch.bmm(each, values[one.blocks].flatten(0, 1).to(dtype), out=product)
        out = torch.zeros((len(most), group, out_width), device=query.device)
        out.index_add_(0, lines.at, found.float().view(-1, group, out_width))
        return out.div_(total[..., None])[:-kept].reshape(1, rows, heads, out_width)
