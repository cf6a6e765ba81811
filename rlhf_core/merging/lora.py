"""What an adapter does to one tensor of its base, worked out as the tensor is read.

Hu et al. 2021, LoRA (arXiv 2106.09685), section 4.1: W = W₀ + s·B·A. Liu et al. 2024, DoRA (arXiv 2402.09353), equation 5:
W = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, norms over each row. Float32 throughout, and never through a copy of the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.merging.checkpoint import Checkpoint, Renamed
from rlhf_core.merging.streams import Source


class LoraSource(Renamed):
    """A tensor of the base with its low-rank update.

    Args:
        base: W₀, (rows, columns) or (experts, rows, columns).
        left: s·B, (experts, rows, r); one expert where the tensor is a matrix.
        right: A, (experts, r, columns).
    """

    def __init__(self, base: Source, left: Tensor, right: Tensor, owner: Checkpoint) -> None:
        super().__init__(base, owner)
        self.left, self.right = left, right

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.base.read(start, stop, out)
        self._add(start, stop, out)

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        self.base.read_runs(starts, out)
        for start, row in zip(starts, out, strict=True):
            self._add(start, start + len(row), row)

    def _add(self, start: int, stop: int, out: Tensor) -> None:
        columns = self.right.shape[-1]
        first, last = start // columns, -(-stop // columns)
        update = self.update(first, last).view(-1)[start - first * columns : stop - first * columns]
        out.add_(update.to(out.device))

    def update(self, first: int, last: int) -> Tensor:
        """Return rows of s·B·A, those of all experts counted one after the other."""
        rows = self.left.shape[1]
        parts = []
        for expert in range(first // rows, (last - 1) // rows + 1):
            begin, end = max(first - expert * rows, 0), min(last - expert * rows, rows)
            parts.append(self.left[expert, begin:end] @ self.right[expert])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class DoraSource(LoraSource):
    """A matrix of the base with its low-rank update, each row scaled to its magnitude, (rows,)."""

    def __init__(self, base: Source, left: Tensor, right: Tensor, magnitude: Tensor, owner: Checkpoint) -> None:
        super().__init__(base, left, right, owner)
        self.magnitude = magnitude

    def read(self, start: int, stop: int, out: Tensor) -> None:
        columns = self.right.shape[-1]
        first, last = start // columns, -(-stop // columns)
        rows = torch.empty(last - first, columns)
        self.base.read(first * columns, last * columns, rows.view(-1))
        rows.add_(self.update(first, last))
        rows.mul_((self.magnitude[first:last] / torch.linalg.vector_norm(rows, dim=1))[:, None])
        out.copy_(rows.view(-1)[start - first * columns : stop - first * columns])

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        for start, row in zip(starts, out, strict=True):
            self.read(start, start + len(row), row)


class RowsSource(Renamed):
    """A table of the base in which some rows were trained; `rows` is where each of `values`, (n, columns), stands."""

    def __init__(self, base: Source, rows: Sequence[int], values: Tensor, owner: Checkpoint) -> None:
        super().__init__(base, owner)
        self._rows, self._values = list(rows), values

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.base.read(start, stop, out)
        self._put(start, stop, out)

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        self.base.read_runs(starts, out)
        for start, row in zip(starts, out, strict=True):
            self._put(start, start + len(row), row)

    def _put(self, start: int, stop: int, out: Tensor) -> None:
        columns = self._values.shape[1]
        for row, values in zip(self._rows, self._values, strict=True):
            begin, end = max(start, row * columns), min(stop, (row + 1) * columns)
            if begin < end:
                out[begin - start : end - start] = values[begin - row * columns : end - row * columns]


def scale_of(alpha: float, rank: int, *, stabilised: bool) -> float:
    """Return s: α / r, or α / √r for rank-stabilised adapters (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if stabilised else rank)
