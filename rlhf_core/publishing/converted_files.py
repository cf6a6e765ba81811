"""The files of an export: copied as they are, or converted to another dtype, a part of one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlhf_core.infra.errors import NumbersError
from rlhf_core.infra.files import read_json, replace_json, write_file
from rlhf_core.infra.model_files import HEADS, INDEX
from rlhf_core.infra.safetensors_file import encode_header
from rlhf_core.merging.tensor_reader import WeightFile

_CHUNK = 1 << 22
"""Elements that are converted at once: a part of a large tensor, never a whole file."""


def copy_model(source: Path, target: Path, *, dtype: torch.dtype | None = None) -> None:
    """Copy a model's files into a new directory, the parts of an ensemble too; hidden ones and GGUF files stay behind.

    Args:
        source: the model's directory.
        target: made here.
        dtype: of the floating tensors in safetensors files, but for heads beside the weights; None copies them as they are.

    Raises:
        NumbersError: the dtype can't hold a value.
    """
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.name.startswith("."):
            continue
        if file.is_dir():
            if file.name.startswith("member-"):
                copy_model(file, target / file.name, dtype=dtype)
        elif file.suffix == ".safetensors" and dtype is not None and file.stem not in HEADS:
            convert_file(file, target / file.name, dtype)
        elif file.suffix != ".gguf":
            shutil.copyfile(file, target / file.name)
    if dtype is not None:
        _note_dtype(target, dtype)


def convert_file(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a safetensors file with its floating tensors in another dtype.

    Raises:
        NumbersError: the dtype can't hold a value.
    """
    file = WeightFile(source, str(source.parent))
    try:
        kinds = {name: dtype if one.dtype.is_floating_point else one.dtype for name, one in file.tensors.items()}
        # Wide elements first, as `encode_header` needs it.
        names = sorted(kinds, key=lambda name: (-kinds[name].itemsize, name))

        def chunks() -> Iterator[Any]:
            yield encode_header({name: (kinds[name], file.tensors[name].shape) for name in names}, format="pt")
            for name in names:
                one = file.tensors[name]
                for start in range(0, one.count, _CHUNK):
                    part = torch.empty(min(_CHUNK, one.count - start), dtype=one.dtype)
                    one.read(start, start + len(part), part)
                    yield _converted(part, kinds[name], name).view(torch.uint8).numpy().data

        write_file(target, chunks())
    finally:
        file.close()


def _converted(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return values in another dtype. Raises NumbersError where it makes them infinite."""
    made = values.to(dtype)
    if made.is_floating_point() and not bool(made.isfinite().all()) and bool(values.isfinite().all()):
        kind = str(dtype).removeprefix("torch.")
        got = f"{float(values.abs().max()):g}"
        raise NumbersError(f"tensor `{name}` has values that {kind} can't hold", got=got, fix="choose `--dtype bf16`")
    return made


def _note_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Write the dtype into a model's configuration, and its new size into the index of its shards."""
    short = str(dtype).removeprefix("torch.")
    if (config := directory / "config.json").is_file():
        values = read_json(config)
        for part in (values, values.get("text_config")):
            for key in ("dtype", "torch_dtype"):
                if isinstance(part, dict) and key in part:
                    part[key] = short
        replace_json(config, values)
    if (index := directory / INDEX).is_file():
        values = read_json(index)
        files = [WeightFile(directory / name, str(directory)) for name in set(values["weight_map"].values())]
        total = sum(one.nbytes for file in files for one in file.tensors.values())
        for file in files:
            file.close()
        replace_json(index, {**values, "metadata": {**(values.get("metadata") or {}), "total_size": total}})
