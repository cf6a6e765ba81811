"""Tensors to and from safetensors files, one tensor in flight: hashed and fsynced while written, bounded when read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_core.infra.files import FileRecord, write_file

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound on the header's length."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes that the tensors' values take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file. Values are moved to the host one tensor at a time, so no second copy is held."""
    # Wide elements first keeps every tensor aligned to its element size without gaps, which the format forbids.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    return write_file(path, _chunks(order, tensors))


def _chunks(order: list[str], tensors: Mapping[str, Tensor]) -> Iterator[Buffer]:
    header, offset = {}, 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file written by `write_tensors` into host memory.

    Raises:
        ValueError: the header is too long, malformed, or names a tensor twice.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ValueError(f"{path.name} has no valid header")
        names = json.loads(
            handle.read(length).decode("utf-8"), object_pairs_hook=lambda pairs: [key for key, _ in pairs]
        )
    if len(set(names)) != len(names):
        raise ValueError(f"{path.name} names a tensor twice")
    try:
        with safe_open(path, framework="pt") as source:
            return {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None
