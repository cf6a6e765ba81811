"""Tensors to and from safetensors files, one tensor in flight: hashed and fsynced while written, bounded when read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_core.infra.files import FileRecord, unique_keys, write_file

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound on the header's length."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes that the tensors' values take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file. Values are moved to the host one tensor at a time, so no second copy is held."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    return write_file(path, _chunks(order, tensors))


def encode_header(entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], **metadata: str) -> bytes:
    """Return the start of a safetensors file in which these tensors lie one after the other, in this order.

    Wide elements must come first: that keeps every tensor aligned to its element size without gaps, which the format forbids.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chunks(order: list[str], tensors: Mapping[str, Tensor]) -> Iterator[Buffer]:
    yield encode_header({name: (tensors[name].dtype, tensors[name].shape) for name in order})
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte from the file's."""
    nbytes: int

    @property
    def count(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read what a safetensors file holds, and check that it does, without reading a value.

    Raises:
        ValueError: the header is too long, malformed, names a tensor twice, or doesn't fit the file.
    """
    size = path.stat().st_size
    header, data = _raw_header(path, size)
    return {name: _entry(path, name, described, data, size) for name, described in header.items()}


def header_entries(path: Path) -> dict[str, Any]:
    """Return what a safetensors file's header says of each tensor (`dtype`, `shape`, `data_offsets`), of whatever type it is.

    Raises:
        ValueError: the header is too long, malformed, or names a tensor twice.
    """
    return _raw_header(path, path.stat().st_size)[0]


def _raw_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path.name} has no valid header")
        try:
            header = json.loads(handle.read(length).decode("utf-8"), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} has no valid header")
    header.pop("__metadata__", None)
    return header, 8 + length


def _entry(path: Path, name: str, described: Any, data: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (first, last) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
        numbers = (first, last, *shape)
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path.name} describes tensor {name!r} wrongly") from None
    if dtype not in _DTYPES:
        raise ValueError(f"{path.name}: tensor {name!r} has the type {dtype}, which isn't read here")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{path.name} describes tensor {name!r} wrongly")
    entry = TensorEntry(_DTYPES[dtype], shape, data + first, last - first)
    if entry.nbytes != entry.count * entry.dtype.itemsize:
        raise ValueError(f"{path.name}: tensor {name!r} has {entry.nbytes} bytes, not those of its shape {list(shape)}")
    if data + last > size:
        raise ValueError(f"{path.name} is cut off: {size} bytes, tensor {name!r} ends at {data + last}")
    return entry


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into host memory.

    Raises:
        ValueError: as `read_header`.
    """
    from safetensors import SafetensorError, safe_open

    names = read_header(path)
    try:
        with safe_open(path, framework="pt") as source:
            return {name: source.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None
