"""The keys and values of many sequences in blocks of memory, shared where sequences share their beginning.

A sequence is a chain of stretches. A stretch is some tokens in blocks of its own; it is written by one sequence until that
sequence is forked, and never again afterwards: whoever appends then begins a stretch of his own behind it. So a fork takes
constant time, whatever the length, and so does freeing a sequence, but for the blocks that nobody else holds.

Axes: N tokens, K key-value heads, D head width, B blocks, S places per block.
"""

from __future__ import annotations

import heapq
import itertools
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_core.infra.errors import RLHFError


class OutOfBlocks(Exception):
    """Every block is in use."""


class Stretch:
    """Some of a sequence's tokens in blocks of its own, behind the stretches of its ancestors."""

    __slots__ = ("blocks", "holders", "length", "number", "parent", "start")

    numbers = itertools.count()

    def __init__(self, parent: Stretch | None, start: int) -> None:
        self.parent = parent
        self.start = start
        """Tokens before it: of its ancestors' tokens the sequence sees so many."""
        self.length = 0
        """Tokens in it."""
        self.blocks: list[int] = []
        self.holders = 1
        """How many sequences and stretches refer to it; only a stretch with one holder may grow."""
        self.number = next(Stretch.numbers)

    @property
    def end(self) -> int:
        """Tokens up to its end, its ancestors' included."""
        return self.start + self.length


class BlockView(NamedTuple):
    """How much of one block a sequence sees."""

    block: int
    tokens: int
    """The first so many places are seen."""
    stretch: Stretch


class CachedSequence:
    """A sequence whose keys and values are in a `PagedKVCache`, until it is freed: by `free`, or as nothing refers to it."""

    __slots__ = ("_stretch", "cache")

    def __init__(self, cache: PagedKVCache, stretch: Stretch) -> None:
        self.cache = cache
        self._stretch: Stretch | None = stretch
        cache.num_sequences += 1

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then modules that it needs may be gone
            self.free()

    @property
    def freed(self) -> bool:
        return self._stretch is None

    @property
    def stretch(self) -> Stretch:
        """Its last stretch.

        Raises:
            ValueError: the sequence was freed.
        """
        if self._stretch is None:
            raise ValueError("the sequence was freed")
        return self._stretch

    @property
    def length(self) -> int:
        """Tokens whose keys and values are kept."""
        return self.stretch.end

    def fork(self, length: int | None = None) -> CachedSequence:
        """Return another sequence with the same tokens, or with the first `length` of them, in constant time."""
        stretch = self.stretch
        if length is not None and not 0 <= length <= stretch.end:
            raise ValueError(f"a sequence of {stretch.end} tokens has no first {length}")
        stretch.holders += 1
        return CachedSequence(self.cache, stretch if length in (None, stretch.end) else Stretch(stretch, length))

    def append(self, tokens: int) -> None:
        """Make places for further tokens; their keys and values are then written with `PagedKVCache.write`.

        Raises:
            OutOfBlocks: too few blocks are free; the sequence is as it was.
        """
        stretch = self.stretch
        if stretch.holders > 1 or (
            self.cache.fills_blocks and not stretch.blocks and stretch.start % self.cache.block_size
        ):
            self._begin_own_stretch(tokens)
        stretch, size = self.stretch, self.cache.block_size
        missing = -(-(stretch.length + tokens) // size) - len(stretch.blocks)
        if missing > 0:
            stretch.blocks += self.cache.take(missing)
        stretch.length += tokens

    def shorten(self, length: int) -> None:
        """Give up the last tokens, all of which were appended since the sequence was last forked; `length` are left.

        Raises:
            ValueError: others may see tokens that would be given up, or there are fewer.
        """
        stretch = self.stretch
        if stretch.holders > 1 or not stretch.start <= length <= stretch.end:
            raise ValueError(f"of {stretch.end} tokens, {length} can't be kept alone")
        stretch.length = length - stretch.start
        needed = self.cache.blocks_for(stretch.length)
        self.cache.give_back(stretch.blocks[needed:])
        del stretch.blocks[needed:]

    def blocks_to_append(self, tokens: int) -> int:
        """Return at most how many blocks `append` takes for so many tokens."""
        stretch, cache = self.stretch, self.cache
        if stretch.holders > 1 or not stretch.blocks:
            # Where blocks must be full, a partly filled one is copied.
            return cache.blocks_for(tokens + (cache.block_size - 1 if cache.fills_blocks else 0))
        return max(0, cache.blocks_for(stretch.length + tokens) - len(stretch.blocks))

    def _begin_own_stretch(self, tokens: int) -> None:
        """Continue in a stretch of the sequence's own, since others hold the present one.

        Where blocks must be full, the last, partly filled block of the present stretch is copied.
        """
        cache, shared = self.cache, self.stretch
        views = list(self.views()) if cache.fills_blocks else []
        tail = views[-1].tokens % cache.block_size if views else 0
        stretch = Stretch(shared, shared.end - tail)
        if tail:
            stretch.blocks = cache.take(-(-(tail + tokens) // cache.block_size))
            stretch.length = tail
            cache.copy(views[-1].block, stretch.blocks[0])
        self._stretch = stretch

    def free(self) -> None:
        """Give up the sequence; blocks that nobody else holds become free. What was freed before stays so."""
        stretch, self._stretch = self._stretch, None
        if stretch is not None:
            self.cache.num_sequences -= 1
            self.cache.release(stretch)

    def views(self) -> Iterator[BlockView]:
        """Yield the sequence's blocks in order, and how much of each it sees."""
        size = self.cache.block_size
        for stretch, end in reversed(list(self.stretches())):
            seen = end - stretch.start
            for index in range(-(-seen // size)):
                yield BlockView(stretch.blocks[index], min(size, seen - index * size), stretch)

    def stretches(self) -> Iterator[tuple[Stretch, int]]:
        """Yield the stretches that hold tokens of the sequence, the last first, and where in the sequence each one ends."""
        stretch: Stretch | None = self.stretch
        end = self.stretch.end
        while stretch is not None:
            if end > stretch.start:
                yield stretch, end
                end = stretch.start
            stretch = stretch.parent

    def places(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the block (N,) and the place within it (N,) of the tokens `start` to `end`, which are in the last stretch."""
        at = np.arange(start, end) - self.stretch.start
        return np.asarray(self.stretch.blocks, dtype=np.int64)[at // self.cache.block_size], at % self.cache.block_size


class PagedKVCache:
    """Blocks of keys and values, one pool per attention layer, all with the same numbering of blocks.

    Memory for a layer is reserved when the layer first writes, and on a CPU occupied only where something was written.

    Args:
        blocks: most blocks that may be in use at once.
        block_size: S, tokens per block.
        device: where the pools are.
        order: `heads` keeps each head's places of a block together, which plain matrix products read fastest; `tokens` keeps each
            token's heads together, as GPU kernels want it.
        fills_blocks: whether only a sequence's last block may be partly filled, as kernels with block tables need it. Else a fork
            begins a block of its own, so a shared, partly filled block stays shared. Block 0 then belongs to no sequence, and
            isn't counted: what must be written somewhere and is never read goes there.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        device: torch.device,
        *,
        order: Literal["heads", "tokens"] = "heads",
        fills_blocks: bool = False,
    ) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"a cache of {blocks} blocks of {block_size} tokens")
        self.capacity, self.block_size, self.device = blocks, block_size, device
        self.order, self.fills_blocks = order, fills_blocks
        self.num_sequences = 0
        """Sequences that aren't freed."""
        self._free: list[int] = []
        """A heap of blocks that were in use before: the lowest is taken first, so that those in use lie close together."""
        self._first = 1 if fills_blocks else 0
        self._unused = self._first
        """Blocks from this one on were never in use."""
        self._copies: dict[int, int] = {}
        """Block → the block that is to be copied into it."""
        self.pools: dict[object, tuple[Tensor, Tensor]] = {}
        """Layer → its keys and its values, (B, K, S, D) or (B, S, K, D)."""

    @property
    def free_blocks(self) -> int:
        return len(self._free) + self._first + self.capacity - self._unused

    @property
    def used_blocks(self) -> int:
        return self.capacity - self.free_blocks

    @property
    def elements_per_token(self) -> int:
        """Numbers per token in the keys and values of all layers that have some."""
        return sum(pool.shape[1:].numel() // self.block_size for pools in self.pools.values() for pool in pools)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks so many tokens in one stretch need."""
        return -(-tokens // self.block_size)

    def new(self) -> CachedSequence:
        """Return an empty sequence."""
        return CachedSequence(self, Stretch(None, 0))

    def take(self, count: int) -> list[int]:
        """Return blocks that were free, the lowest first.

        Raises:
            OutOfBlocks: fewer are free; none is taken.
        """
        if count > self.free_blocks:
            raise OutOfBlocks
        taken = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        more = count - len(taken)
        taken += range(self._unused, self._unused + more)
        self._unused += more
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """Let blocks be taken again that nobody holds any more."""
        for block in blocks:
            heapq.heappush(self._free, block)

    def release(self, stretch: Stretch | None) -> None:
        """Give up one reference to a stretch."""
        while stretch is not None:
            stretch.holders -= 1
            if stretch.holders:
                return
            self.give_back(stretch.blocks)
            stretch.blocks = []
            stretch = stretch.parent

    def grow(self, blocks: int) -> None:
        """Raise the bound on blocks in use to at least so many; what is kept stays."""
        if blocks <= self.capacity:
            return
        self.finish_copies()
        for layer, (keys, values) in self.pools.items():
            grown = tuple(
                _reserved((self._first + blocks, *pool.shape[1:]), pool.dtype, self.device) for pool in (keys, values)
            )
            for new, old in zip(grown, (keys, values), strict=True):
                new[: self._unused].copy_(old[: self._unused])
            self.pools[layer] = (grown[0], grown[1])
        self.capacity = blocks

    def compact(self, sequences: Iterable[CachedSequence]) -> None:
        """Release the memory of blocks that aren't in use, where they are most of it; the bound becomes the blocks in use.

        Args:
            sequences: all that aren't freed.
        """
        idle = len(self._free) if self.device.type == "cpu" else self.free_blocks
        if idle <= self.used_blocks:
            return
        self.finish_copies()
        free = set(self._free)
        used = [block for block in range(self._first, self._unused) if block not in free]
        moved = {block: self._first + at for at, block in enumerate(used)}
        stretches: dict[int, Stretch] = {}
        for sequence in sequences:
            stretch: Stretch | None = sequence.stretch
            while stretch is not None and stretch.number not in stretches:
                stretches[stretch.number] = stretch
                stretch = stretch.parent
        for stretch in stretches.values():
            stretch.blocks = [moved[block] for block in stretch.blocks]
        self._free, self._unused, self.capacity = [], self._first + len(used), max(1, len(used))
        sources = torch.tensor(used, dtype=torch.long, device=self.device)
        for layer, pools in self.pools.items():
            small = tuple(
                _reserved((self._first + self.capacity, *pool.shape[1:]), pool.dtype, self.device) for pool in pools
            )
            for new, old in zip(small, pools, strict=True):
                new[self._first : self._unused].copy_(old.index_select(0, sources))
            self.pools[layer] = (small[0], small[1])

    # Keys and values

    def write(self, layer: object, index: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of tokens, and return the layer's pools.

        Args:
            layer: any key that tells the layer from others.
            index: from `index_of`; (N · K,) where `order` is `heads`, else (N,).
            keys: (N, K, D). values: (N, K, D'), whose width may differ.
        """
        self.finish_copies()
        pools = self.pools.get(layer)
        if pools is None:
            pools = self._reserve(layer, keys, values)
        for pool, new in zip(pools, (keys, values), strict=True):
            if self.order == "heads":
                pool.view(-1, pool.shape[3]).index_copy_(0, index, new.reshape(-1, new.shape[2]))
            else:
                pool.view(-1, *pool.shape[2:]).index_copy_(0, index, new)
        return pools

    def _reserve(self, layer: object, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        def pool(like: Tensor) -> Tensor:
            inner = (
                (like.shape[1], self.block_size, like.shape[2])
                if self.order == "heads"
                else (self.block_size, *like.shape[1:])
            )
            return _reserved((self._first + self.capacity, *inner), like.dtype, self.device)

        self.pools[layer] = (pool(keys), pool(values))
        return self.pools[layer]

    def index_of(self, blocks: np.ndarray, places: np.ndarray, heads: int) -> Tensor:
        """Return where `write` puts tokens, for their blocks (N,) and places within these (N,), and for K `heads`."""
        if self.order == "heads":
            index = (blocks[:, None] * heads + np.arange(heads)) * self.block_size + places[:, None]
        else:
            index = blocks * self.block_size + places
        return torch.from_numpy(index.ravel()).to(self.device, non_blocking=True)

    def read(self, layer: object, views: Sequence[BlockView]) -> tuple[Tensor, Tensor]:
        """Return the keys and values (K, N, D) of what a sequence sees of a layer, copied together."""
        self.finish_copies()
        heads_first = self.order == "heads"

        def read(pool: Tensor) -> Tensor:
            parts = [
                pool[view.block, :, : view.tokens] if heads_first else pool[view.block, : view.tokens].transpose(0, 1)
                for view in views
            ]
            return torch.cat(parts, dim=1)

        keys, values = self.pools[layer]
        return read(keys), read(values)

    def copy(self, source: int, target: int) -> None:
        """Copy a block in all layers, before anything is written or read the next time."""
        self._copies[target] = self._copies.get(source, source)

    def finish_copies(self) -> None:
        """Make the copies that were asked for, all those of a layer at once: rows that share a prompt begin together."""
        if not self._copies:
            return
        targets, sources = (
            torch.tensor(list(blocks), device=self.device) for blocks in (self._copies.keys(), self._copies.values())
        )
        for pools in self.pools.values():
            for pool in pools:
                pool.index_copy_(0, targets, pool.index_select(0, sources))
        self._copies = {}


def _reserved(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU memory is occupied only where something is written.

    Raises:
        RLHFError: the address space doesn't suffice.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
    except (OSError, MemoryError, OverflowError) as error:
        raise RLHFError(f"no memory for a cache of {size:,} bytes") from error
