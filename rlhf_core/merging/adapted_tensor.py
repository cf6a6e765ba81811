"""A tensor of a base model with what an adapter changes in it, computed as the tensor is read.

Hu et al. 2021, LoRA (arXiv 2106.09685), section 4.1: W = W₀ + s·B·A. Liu et al. 2024, DoRA (arXiv 2402.09353), equation 5:
W = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, norms over each row. Float32 throughout, and never through a copy of the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.merging.tensor_reader import TensorReader


@dataclass(frozen=True)
class Update:
    """The values that an adapter has for one tensor of its base, float32."""

    rows: Sequence[int] = ()
    """Numbers of the rows that replace the base's; `row_values`, (rows, columns), are their values."""
    row_values: Tensor | None = None
    left: Tensor | None = None
    """s·B, (experts, rows, r); one expert where the tensor is a matrix."""
    right: Tensor | None = None
    """A, (experts, r, columns)."""
    magnitude: Tensor | None = None
    """DoRA's m, (rows,)."""

    def product(self, first: int, last: int) -> Tensor:
        """Return rows of s·B·A, (last - first, columns); rows are counted over all experts."""
        assert self.left is not None and self.right is not None
        rows = self.left.shape[1]
        parts = []
        for expert in range(first // rows, (last - 1) // rows + 1):
            begin, end = max(first - expert * rows, 0), min(last - expert * rows, rows)
            parts.append(self.left[expert, begin:end] @ self.right[expert])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class AdaptedTensor(TensorReader):
    """W₀ with an adapter's update.

    Args:
        plain: W₀, (rows, columns) or (experts, rows, columns).
        update: returns the update. It is called at each reading, so it caches the update that was used last.
        place: the adapter's name.
    """

    def __init__(self, plain: TensorReader, update: Callable[[], Update], place: str) -> None:
        super().__init__(place, plain.shape, plain.dtype)
        self._plain, self._update = plain, update

    def read(self, start: int, stop: int, out: Tensor) -> None:
        update, columns = self._update(), self.shape[-1]
        first, last = start // columns, -(-stop // columns)
        within = slice(start - first * columns, stop - first * columns)
        if update.magnitude is None:
            self._read_base(update, start, stop, out)
            if update.left is not None:
                out.add_(update.product(first, last).view(-1)[within].to(out.device))
            return
        # Norms are over whole rows.
        rows = torch.empty(last - first, columns)
        self._read_base(update, first * columns, last * columns, rows.view(-1))
        rows.add_(update.product(first, last))
        rows.mul_((update.magnitude[first:last] / torch.linalg.vector_norm(rows, dim=1))[:, None])
        out.copy_(rows.view(-1)[within])

    def _read_base(self, update: Update, start: int, stop: int, out: Tensor) -> None:
        """Read W₀ with the trained rows in it."""
        self._plain.read(start, stop, out)
        if update.row_values is None:
            return
        columns = self.shape[-1]
        for row, values in zip(update.rows, update.row_values, strict=True):
            begin, end = max(start, row * columns), min(stop, (row + 1) * columns)
            if begin < end:
                out[begin - start : end - start] = values[begin - row * columns : end - row * columns]


def scale_of(alpha: float, rank: int, *, stabilised: bool) -> float:
    """Return s: α / r, or α / √r for rank-stabilised adapters (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if stabilised else rank)
