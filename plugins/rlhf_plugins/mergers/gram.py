"""Inner products of a tensor's models: all that methods on directions and angles need to know of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy
import torch
from torch import Tensor

from rlhf_core.plugin import CHUNK

_BLOCK = 1 << 8
_PIECE = CHUNK
"""Elements whose blocks are summed at once: a longer chunk, as threads have, is a few of these, so that sums round the same."""


def gram_matrix(chunks: Iterable[Sequence[Tensor]]) -> numpy.ndarray:
    """Return ⟨xᵢ, xⱼ⟩, (K, K) float64.

    Args:
        chunks: for each chunk of the vectors its part of every xᵢ, each (N,) float32.

    Products are summed in float32 over blocks short enough to lose nothing that counts, and blocks in float64.
    """
    total = numpy.zeros(())
    pieces = (
        piece for parts in chunks for piece in zip(*(part.reshape(-1).split(_PIECE) for part in parts), strict=True)
    )
    for parts in pieces:
        count = parts[0].numel()
        blocks = -(-count // _BLOCK)
        values = torch.zeros((len(parts), blocks * _BLOCK), device=parts[0].device)
        for row, part in zip(values, parts, strict=True):
            row[:count] = part
        cut = values.view(len(parts), blocks, _BLOCK).transpose(0, 1)
        total = total + torch.bmm(cut, cut.transpose(1, 2)).sum(0, dtype=torch.float64).cpu().numpy()
    return total


def cosines(gram: numpy.ndarray) -> numpy.ndarray:
    """Return cos ∠(xᵢ, xⱼ) from ⟨xᵢ, xⱼ⟩, (K, K); 0 where one of the two is zero."""
    norms = numpy.sqrt(numpy.diag(gram))
    sizes = numpy.outer(norms, norms)
    found = numpy.divide(gram, sizes, out=numpy.zeros_like(gram), where=sizes > 0)
    return found.clip(-1.0, 1.0)
