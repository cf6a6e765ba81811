"""Tensors of inputs, wherever they lie: runs equal what one reading gives, and what seeds random words stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from merge_helpers import write_weights
from safetensors.torch import save_file

from rlhf_core.merging.open_model import open_model
from rlhf_core.merging.streams import TensorStream
from rlhf_core.merging.tensor_reader import MemoryTensor, TensorReader
from rlhf_core.merging.vocabulary import AlignedTensor


def check_runs(reader: TensorReader, length: int = 7) -> None:
    count = reader.shape[0] * reader.shape[1]
    whole = torch.empty(count)
    reader.read(0, count, whole)
    starts = [0, 3, 11, count // 2, count - length]
    found = torch.empty(len(starts), length)
    reader.read_runs(starts, found)
    assert torch.equal(found, torch.stack([whole[start : start + length] for start in starts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_runs_of_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(12, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"w": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    check_runs(open_model(tmp_path).tensors["w"])


def test_runs_of_an_adapter(tmp_path: Path) -> None:
    write_weights(tmp_path / "base", {"model.w.weight": torch.randn(12, 9), "model.v.weight": torch.randn(12, 9)})
    pair = {"A": torch.randn(2, 9), "B": torch.randn(12, 2)}
    (tmp_path / "lora").mkdir()
    save_file(
        {f"base_model.model.model.w.lora_{side}.weight": values for side, values in pair.items()},
        tmp_path / "lora/adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings))
    adapter = open_model(tmp_path / "lora")
    assert adapter.base is not None and adapter.base.name == str(tmp_path / "base")
    for name in ("model.w.weight", "model.v.weight"):
        check_runs(adapter.tensors[name])


def test_runs_of_rows_that_are_lined_up() -> None:
    plain, other = (MemoryTensor(torch.randn(6, 5)) for _ in range(2))
    rows = numpy.array([4, 5, -1, 0, 1, 2])  # the result's third row is one that this input lacks
    check_runs(AlignedTensor(plain, rows, [(plain, rows), (other, numpy.arange(6))], based=False))


def test_what_seeds_random_words_stays_as_it_is() -> None:
    """Another digest, or other words, would drop other entries for the same recipe and seed."""
    values = torch.arange(10_000.0).view(100, 100)
    assert MemoryTensor(values).fingerprint().hex() == "eff098a0ea4a5648c0366ba1c2183017"
    base, model = MemoryTensor(torch.zeros(100, 100)), MemoryTensor(values)
    for chunk in (64, 1 << 18):
        stream = TensorStream("w", base, [model], seed=7, chunk=chunk)
        words = torch.cat([chunk.random(0) for chunk in stream.chunks()])
        assert words[:4].tolist() == [14780, -21315, -23353, 29866]
        assert words[-4:].tolist() == [-11636, 15660, -29663, -24124]


def test_one_entry_of_a_short_tensor_tells_models_apart() -> None:
    values = torch.zeros(2048)
    for place in range(0, 2048, 97):
        other = values.clone()
        other[place] = 1.0
        assert MemoryTensor(other).fingerprint() != MemoryTensor(values).fingerprint()
