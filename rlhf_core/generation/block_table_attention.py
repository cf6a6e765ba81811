"""Attention to keys and values in a `PagedKVCache` through tables of its blocks, as GPU kernels take them.

A library's kernel reads keys and values where they are: flash-attn's where that package is installed, else the one that PyTorch
ships. Each is tried once per kind of input, and the first that agrees with plain products is used. Where none does, and in
float32, which they don't take, plain products do the work.

Axes: R sequences, N new tokens of all, W blocks of a sequence, S places per block, B blocks of the cache, H query heads, K
key-value heads, D head width.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_core.generation.cached_attention import ChunkAttention
from rlhf_core.generation.paged_cache import CachedSequence, PagedKVCache
from rlhf_core.infra.errors import describe_error
from rlhf_core.models.attention import MAX_HEAD_WIDTH, MAX_KERNEL_DIFFERENCE

log = logging.getLogger(__name__)

KERNEL_BLOCK = 256
"""Places per block, or a divisor of them, that the libraries' kernels take."""


@dataclass(frozen=True)
class BlockTables:
    """Where the keys and values are that some sequences' new tokens attend to."""

    query_starts: Tensor
    """(R + 1,) int32: where each sequence's new tokens begin among N, and N."""
    lengths: Tensor
    """(R,) int32: tokens of each sequence, the new ones included; at least 1."""
    key_starts: Tensor
    """(R + 1,) int32: the sums of the lengths, from 0 on."""
    blocks: Tensor
    """(R, W) int32: each sequence's blocks in order; any beyond its last."""
    longest_query: int
    """At least as many as any sequence has new tokens."""

    @classmethod
    def of(cls, query_starts: Tensor, lengths: Tensor, blocks: Tensor, *, longest_query: int) -> BlockTables:
        """Return tables for their parts, without waiting for the device."""
        key_starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(query_starts, lengths, key_starts, blocks, longest_query)


PagedKernel = Callable[[Tensor, Tensor, Tensor, BlockTables, float], Tensor]
"""Queries (N, H, D), a layer's keys and values (B, S, K, D), tables and the scale of products → attention (N, H, D).

Each new token sees all tokens before it in its sequence, and itself.
"""


# The kernels


def attend_plainly(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, blocks: Tensor, *, scale: float
) -> Tensor:
    """Return the attention (R, H, D') of one token per sequence by plain products, keys and values copied together first.

    Args:
        query: (R, H, D). keys: (B, S, K, D). values: (B, S, K, D').
        lengths: (R,) tokens that each sees. blocks: (R, W), see `BlockTables`.
    """
    rows, kept = len(query), keys.shape[2]

    def gathered(pool: Tensor) -> Tensor:  # (K, R, W · S, width), in the order in which products read it
        return pool.permute(2, 0, 1, 3).index_select(1, blocks.flatten()).reshape(kept, rows, -1, pool.shape[3])

    queries = query.unflatten(1, (kept, -1)).transpose(0, 1) * scale  # (K, R, H / K, D)
    scores = queries @ gathered(keys).transpose(2, 3)  # (K, R, H / K, W · S)
    hidden = torch.arange(scores.shape[3], device=query.device) >= lengths[:, None, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return (weights.to(values.dtype) @ gathered(values)).transpose(0, 1).flatten(1, 2)


def torch_paged(query: Tensor, keys: Tensor, values: Tensor, tables: BlockTables, scale: float) -> Tensor:
    """Call the kernel that PyTorch ships, flash-attn 2."""
    return _torch_paged(query, keys, values, tables, scale, tables.key_starts)


def torch_paged_by_lengths(query: Tensor, keys: Tensor, values: Tensor, tables: BlockTables, scale: float) -> Tensor:
    """Call the kernel that PyTorch was given in its place, flash-attn 3 or later, which takes lengths alone."""
    return _torch_paged(query, keys, values, tables, scale, None)


def _torch_paged(
    query: Tensor, keys: Tensor, values: Tensor, tables: BlockTables, scale: float, key_starts: Tensor | None
) -> Tensor:
    longest = tables.blocks.shape[1] * keys.shape[1]
    return torch.ops.aten._flash_attention_forward(
        query, keys, values, tables.query_starts, key_starts, tables.longest_query, longest, 0.0, True, False,
        scale=scale, seqused_k=tables.lengths, block_table=tables.blocks,
    )[0]  # fmt: skip


def flash_attn_paged(query: Tensor, keys: Tensor, values: Tensor, tables: BlockTables, scale: float) -> Tensor:
    """Call the package flash-attn: for one new token per sequence its kernel that divides the keys, else that for many."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    if tables.longest_query == 1:
        found = flash_attn_with_kvcache(
            query[:, None], keys, values, cache_seqlens=tables.lengths, block_table=tables.blocks,
            softmax_scale=scale, causal=True,
        )  # fmt: skip
        return found[:, 0]
    longest = tables.blocks.shape[1] * keys.shape[1]
    return flash_attn_varlen_func(
        query, keys, values, tables.query_starts, tables.key_starts, tables.longest_query, longest,
        softmax_scale=scale, causal=True, block_table=tables.blocks,
    )  # fmt: skip


# The choice of one


def library_kernels(device: torch.device) -> list[PagedKernel]:
    """Return the kernels that may be used on a device, the one to be tried first at the beginning."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return []
    own: list[PagedKernel] = [torch_paged, torch_paged_by_lengths]
    return [flash_attn_paged, *own] if importlib.util.find_spec("flash_attn") is not None else own


@functools.cache
def paged_kernel(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, block_size: int
) -> PagedKernel | None:
    """Return the first library's kernel that was tried on a device and found right for such inputs, or None.

    Where each was found wrong the reasons are logged, once. Nothing is tried where kernels are known not to take the inputs.

    Args:
        heads: H. key_heads: K. width: D, of keys and values alike. block_size: S.
    """
    if dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > MAX_HEAD_WIDTH or block_size % KERNEL_BLOCK:
        return None
    obstacles = []
    for kernel in library_kernels(device):
        obstacle = paged_kernel_obstacle(kernel, device, dtype, heads, key_heads, width, block_size)
        if obstacle is None:
            return kernel
        obstacles.append(f"{kernel.__name__}: {obstacle}")
    if obstacles:
        log.info(
            "decoding copies keys and values together, since no library's kernel can be used: %s", "; ".join(obstacles)
        )
    return None


@torch.no_grad()
def paged_kernel_obstacle(
    kernel: PagedKernel,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    width: int,
    block_size: int,
) -> str | None:
    """Compare a kernel over block tables with plain products, for one new token per sequence and for many.

    Returns:
        What is wrong with the kernel, in words; None where its results agree up to rounding.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    lengths = [1, block_size, block_size + 1, 2 * block_size + 37, 70]
    blocks = torch.tensor([[5, 0, 0], [2, 0, 0], [7, 1, 0], [4, 8, 3], [6, 0, 0]], device=device)
    keys, values = draw(9, block_size, key_heads, width), draw(9, block_size, key_heads, width)
    for counts in ([1] * 5, [1, 30, 1, 67, 70]):
        query = draw(sum(counts), heads, width)
        ends = [length - count + 1 + k for length, count in zip(lengths, counts, strict=True) for k in range(count)]
        each = torch.repeat_interleave(blocks, torch.tensor(counts, device=device), dim=0)
        expected = attend_plainly(
            query.float(), keys.float(), values.float(), torch.tensor(ends, device=device), each, scale=width**-0.5
        )
        tables = BlockTables.of(
            _starts(counts, device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
            blocks.int(),
            longest_query=max(counts),
        )
        try:
            with torch.autocast(device.type, enabled=False):
                found = kernel(query, keys, values, tables, width**-0.5).float()
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, ImportError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return describe_error(error, lines=1)
        if found.shape != expected.shape:
            return f"its output has the shape {tuple(found.shape)}"
        # Token by token: one wrong row among many would not show in a norm over all.
        difference = float(((found - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).max())
        if not difference < MAX_KERNEL_DIFFERENCE:  # so written that NaN counts as wrong
            return f"its output for {max(counts)} new tokens differs by {difference:.1e}"
    return None


def _starts(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return (R + 1,) int32: where each of some stretches of tokens begins, and their sum."""
    return F.pad(torch.tensor(counts, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32), (1, 0))


def _kernel_for(query: Tensor, keys: Tensor, values: Tensor) -> PagedKernel | None:
    """Return the kernel for queries (N, H, D) and a layer's keys and values."""
    if keys.shape != values.shape:
        return None
    block_size, key_heads, width = keys.shape[1:]
    return paged_kernel(query.device, query.dtype, query.shape[1], key_heads, width, block_size)


# What reaches a model's layers


class TableDecodingAttention:
    """Attention of one new token per row to what its table shows; all that it needs is on the device.

    Args:
        index: (R,) long, where the new tokens' keys and values are written; see `PagedKVCache.write`.
    """

    def __init__(self, cache: PagedKVCache, index: Tensor, tables: BlockTables) -> None:
        self.cache, self.index, self.tables = cache, index, tables

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Write the new tokens' keys and values, and return the attention (1, R, H, D) of a layer; see `CachedAttention`."""
        with torch.autocast(query.device.type, enabled=False):
            own, key = query[0].transpose(0, 1).to(value.dtype), key.to(value.dtype)  # (R, H, D)
            keys, values = self.cache.write(module, self.index, key[0].transpose(0, 1), value[0].transpose(0, 1))
            kernel, tables = _kernel_for(own, keys, values), self.tables
            if kernel is not None:
                return kernel(own, keys, values, tables, scale)[None]
            return attend_plainly(own, keys, values, tables.lengths, tables.blocks, scale=scale)[None]


class TableChunkAttention(ChunkAttention):
    """Several new tokens per sequence, all sequences in one call of a library's kernel; without one as `ChunkAttention`."""

    def __init__(self, cache: PagedKVCache, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        super().__init__(cache, sequences, counts)
        tables = [[view.block for view in one.views()] for one in sequences]
        most = max(map(len, tables))
        device = cache.device
        self._tables = BlockTables.of(
            _starts(counts, device),
            torch.tensor([one.length for one in sequences], dtype=torch.int32, device=device),
            torch.tensor([[*row, *[0] * (most - len(row))] for row in tables], dtype=torch.int32, device=device),
            longest_query=max(counts),
        )

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pools: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        own = query[0].transpose(0, 1).to(value.dtype)
        kernel = _kernel_for(own, *pools)
        if kernel is None:
            return super()._attend(module, query, key, value, pools, scale)
        return kernel(own, *pools, self._tables, scale)[None]
