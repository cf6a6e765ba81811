"""One tensor of one input, read by ranges of elements: from a safetensors file or from memory.

Values are read where they are wanted, straight into a small buffer per thread: nothing is mapped or kept, so a merge's memory
doesn't grow with its inputs.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.files import storage_error, storage_errors
from rlhf_core.infra.safetensors_file import TensorEntry, read_header

_SAMPLED_RUNS, _SAMPLED_RUN = 32, 128
"""Runs of a tensor that its fingerprint hashes, and their length. It seeds random words: with other numbers DARE drops others."""


class TensorReader(ABC):
    """A tensor of an input, whose elements are read in row-major order.

    Args:
        place: the input that it belongs to, for messages.
        shape: of the whole tensor.
        dtype: in which it is stored.
    """

    def __init__(self, place: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.place, self.shape, self.dtype = place, tuple(shape), dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements as they are stored."""
        return self.count * self.dtype.itemsize

    @abstractmethod
    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copy the elements from `start` to `stop` to `out`, (stop - start,), of any dtype and device."""

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        """Copy a run of elements from each of `starts` on to the rows of `out`, (runs, length)."""
        for start, row in zip(starts, out, strict=True):
            self.read(start, start + len(row), row)

    def fingerprint(self) -> bytes:
        """Return a hash of short runs of values at even distances, the first and the last among them."""
        size = min(self.count, _SAMPLED_RUN)
        starts = sorted({int(place) for place in numpy.linspace(0, self.count - size, _SAMPLED_RUNS)})
        values = torch.empty(len(starts), size)
        self.read_runs(starts, values)
        return hashlib.blake2b(values.numpy().tobytes(), digest_size=16).digest()


class MemoryTensor(TensorReader):
    """A tensor in memory."""

    def __init__(self, tensor: Tensor, place: str = "memory") -> None:
        super().__init__(place, tensor.shape, tensor.dtype)
        self._flat = tensor.reshape(-1)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self._flat[start:stop])


class WeightFile:
    """A safetensors file that is open for reading from several threads, and its tensors by name.

    Args:
        path: the file.
        place: the input that it belongs to.

    Raises:
        ModelError: it is damaged, or names a tensor like a path.
    """

    def __init__(self, path: Path, place: str) -> None:
        self.path = path
        with storage_errors(path):
            try:
                entries = read_header(path)
            except ValueError as error:
                raise ModelError(
                    "a weight file is damaged", place=place, got=error, fix="copy the file again"
                ) from None
            for name in entries:
                if not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
                    raise ModelError(
                        f"{path.name} names a tensor like a path",
                        place=place,
                        got=repr(name),
                        fix="don't use the file, unless you trust it: then rename the tensor and save it again",
                    )
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.close = weakref.finalize(self, os.close, self._descriptor)
        """Closes the file, once; so does losing the last reference, as where opening another input fails."""
        self.tensors = {name: FileTensor(self, entry, place) for name, entry in entries.items()}

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on."""
        try:
            while (got := os.preadv(self._descriptor, [buffer], offset)) < len(buffer):
                if got == 0:
                    raise OSError(None, "the file ended early: it was changed while it was read")
                buffer, offset = buffer[got:], offset + got
        except OSError as error:
            raise storage_error(error, self.path) from error


class FileTensor(TensorReader):
    """A tensor in a safetensors file."""

    def __init__(self, file: WeightFile, entry: TensorEntry, place: str) -> None:
        super().__init__(place, entry.shape, entry.dtype)
        self._file, self._start = file, entry.start

    def read(self, start: int, stop: int, out: Tensor) -> None:
        size = self.dtype.itemsize
        if out.dtype == self.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._file.read_into(out.view(torch.uint8).numpy().data, self._start + start * size)
        else:
            buffer = _buffer((stop - start) * size)
            self._file.read_into(buffer.data, self._start + start * size)
            out.copy_(torch.from_numpy(buffer).view(self.dtype))

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        size, length = self.dtype.itemsize, out.shape[1] * self.dtype.itemsize
        buffer = _buffer(len(starts) * length)
        for number, start in enumerate(starts):
            self._file.read_into(buffer.data[number * length : (number + 1) * length], self._start + start * size)
        out.copy_(torch.from_numpy(buffer).view(self.dtype).view(out.shape))


_thread = threading.local()


def _buffer(nbytes: int) -> numpy.ndarray:
    """Return a buffer of this thread, which the next call overwrites."""
    room = getattr(_thread, "room", None)
    if room is None or len(room) < nbytes:
        room = _thread.room = numpy.empty(max(nbytes, 1 << 18), dtype=numpy.uint8)
    return room[:nbytes]
