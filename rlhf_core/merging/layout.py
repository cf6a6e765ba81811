"""The layout of a merged checkpoint: its tensors, each with its place in one of its files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_core.infra.safetensors_file import encode_header
from rlhf_core.merging.checkpoint import SINGLE

MERGED = {torch.float32, torch.bfloat16, torch.float16}
"""Types that are merged; whole numbers and flags are copied where all inputs agree on them."""


@dataclass(frozen=True)
class Item:
    """One tensor of the result."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    merged: bool
    """Whether it is merged; else it is the same in all inputs and copied."""
    file: str
    start: int
    """Offset of its first byte in the file."""
    head: str | None = None
    """The head that it belongs to, beside the model's weights; its name begins with it."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class OutputFile:
    """A weight file of the result."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Described:
    """A tensor of the result that has no place yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    merged: bool


def lay_out(described: Sequence[Described], shard_size: int) -> tuple[list[Item], list[OutputFile]]:
    """Fill files in the order of the names, each up to `shard_size`, then wide elements first within a file."""
    shards: list[list[Described]] = [[]]
    room = shard_size
    for one in described:
        size = math.prod(one.shape) * one.dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append(one)
        room -= size
    items: list[Item] = []
    files = []
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        own, file = lay_out_file(name, shard)
        items += own
        files.append(file)
    return items, files


def lay_out_file(name: str, described: Sequence[Described], head: str | None = None) -> tuple[list[Item], OutputFile]:
    """Put tensors into one file; those of a head bear its name before their own, outside of the file."""
    ordered = sorted(described, key=lambda one: -one.dtype.itemsize)
    header = encode_header({one.name: (one.dtype, one.shape) for one in ordered}, format="pt")
    start = len(header)
    items = []
    for one in ordered:
        full = one.name if head is None else f"{head}.{one.name}"
        items.append(Item(full, one.shape, one.dtype, one.merged, name, start, head))
        start += items[-1].nbytes
    return items, OutputFile(name, header, start)
