"""Inner products of vectors that are read in chunks: from them slerp, Karcher means and model stock compute angles and norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy
import torch
from torch import Tensor

from rlhf_core.plugin import CHUNK

_BLOCK = 1 << 8
"""Elements whose products are summed in float32; the sums of blocks are added in float64."""
SLICE = CHUNK
"""Elements whose blocks are summed in one call. Longer chunks are divided into slices, so that sums round the same for any chunk
size."""


def gram_matrix(chunks: Iterable[Sequence[Tensor]]) -> numpy.ndarray:
    """Return the inner products ⟨xᵢ, xⱼ⟩ of K vectors, (K, K) float64.

    Products are summed in float32 over blocks of 256 elements, short enough for a small rounding error, and blocks in float64.

    Args:
        chunks: the vectors chunk by chunk: for each chunk, its elements of every xᵢ, K tensors of one shape, float32.
    """
    total = numpy.zeros(())
    slices = (
        parts for tensors in chunks for parts in zip(*(one.reshape(-1).split(SLICE) for one in tensors), strict=True)
    )
    for parts in slices:
        count = parts[0].numel()
        blocks = -(-count // _BLOCK)
        padded = torch.zeros((len(parts), blocks * _BLOCK), device=parts[0].device)  # (K, blocks × 256)
        for row, part in zip(padded, parts, strict=True):
            row[:count] = part
        by_block = padded.view(len(parts), blocks, _BLOCK).transpose(0, 1)  # (blocks, K, 256)
        total = total + torch.bmm(by_block, by_block.transpose(1, 2)).sum(0, dtype=torch.float64).cpu().numpy()
    return total


def cosines(gram: numpy.ndarray) -> numpy.ndarray:
    """Return the cosines of the angles between vectors from their inner products ⟨xᵢ, xⱼ⟩, (K, K); 0 where one of two is zero."""
    norms = numpy.sqrt(numpy.diag(gram))
    sizes = numpy.outer(norms, norms)
    found = numpy.divide(gram, sizes, out=numpy.zeros_like(gram), where=sizes > 0)
    return found.clip(-1.0, 1.0)
