"""Write safetensors files tensor by tensor, hashed and fsynced; check a file's header before anything is read."""

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
"""The largest header that the safetensors format allows."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of all tensors' values in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file; return its hash and length. Tensors are moved to the CPU one at a time, never all at once."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    return write_file(path, _chunks(order, tensors))


def encode_header(entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], **metadata: str) -> bytes:
    """Return the length and header of a safetensors file that holds these tensors' values in this order, without gaps.

    Args:
        entries: name → (dtype, shape), tensors of wide elements first: so each is aligned to its element size, as the format
            wants, although gaps are forbidden.
        metadata: text values of `__metadata__`.
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
    """Yield the header, then the bytes of each tensor in order."""
    yield encode_header({name: (tensors[name].dtype, tensors[name].shape) for name in order})
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's dtype, shape and place in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte from the start of the file."""
    nbytes: int

    @property
    def count(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return name → entry of the tensors in a safetensors file, checked against the file's size; no value is read.

    Raises:
        ValueError: the header is too long, malformed, names a tensor twice, or doesn't fit the file's size.
    """
    size = path.stat().st_size
    header, data = _raw_header(path, size)
    return {name: _entry(path, name, described, data, size) for name, described in header.items()}


def header_entries(path: Path) -> dict[str, Any]:
    """Return the header's entries of a safetensors file (`dtype`, `shape`, `data_offsets` by name), of any dtype, unchecked.

    Raises:
        ValueError: the header is too long, malformed, or names a tensor twice.
    """
    return _raw_header(path, path.stat().st_size)[0]


def _raw_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return a file's header as JSON values, and the offset at which the tensors' values begin."""
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
    """Return a tensor's entry, checked against its shape and the file's size; `data` is where values begin."""
    try:
        dtype, shape, (first, last) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
        numbers = (first, last, *shape)
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path.name} has a malformed entry of tensor {name!r}") from None
    if dtype not in _DTYPES:
        raise ValueError(f"{path.name}: tensor {name!r} has the dtype {dtype}, which isn't supported")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{path.name} has a malformed entry of tensor {name!r}")
    entry = TensorEntry(_DTYPES[dtype], shape, data + first, last - first)
    if entry.nbytes != entry.count * entry.dtype.itemsize:
        raise ValueError(
            f"{path.name}: tensor {name!r} has {entry.nbytes} bytes, which don't fit its shape {list(shape)}"
        )
    if data + last > size:
        raise ValueError(f"{path.name} is cut off: {size} bytes, tensor {name!r} ends at {data + last}")
    return entry


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into CPU memory.

    Raises:
        ValueError: as `read_header`, or the library can't read the file.
    """
    from safetensors import SafetensorError, safe_open

    names = read_header(path)
    try:
        with safe_open(path, framework="pt") as source:
            return {name: source.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None
