"""Small checkpoints to merge, and a merge in one call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.merge import MergeResult, ModelMerger
from rlhf_core.testing.tiny import save_tiny


def write_weights(path: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    """Write a directory of weights without tokenizer, in so many files."""
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    if not (path / "config.json").is_file():
        (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a directory."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def tiny_family(path: Path, count: int = 3, *, step: float = 0.02, **model: Any) -> tuple[Path, list[Path]]:
    """Write a tiny base model and some that are near it, as fine-tuned ones are."""
    base = save_tiny(path / "base", 0, **model)
    weights = read_weights(base)
    models = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number + 1)
        near = save_tiny(path / f"model-{number}", 0, **model)
        moved = {
            name: (tensor + step * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            for name, tensor in weights.items()
        }
        models.append(write_weights(near, moved))
    return base, models


def merge(
    method: str, models: Sequence[Any], output: Path, *, base: Path | None = None, **settings: Any
) -> MergeResult:
    """Merge directories, or entries as `MergeConfig` takes them; `settings` are its fields and the method's options."""
    calls = {name: settings.pop(name, None) for name in ("evaluate", "progress")}
    resume, overwrite = (bool(settings.pop(name, False)) for name in ("resume", "overwrite"))
    own = {name: settings.pop(name) for name in list(settings) if name in MergeConfig.KEYS}
    entries = [str(model) if isinstance(model, Path) else model for model in models]
    config = MergeConfig.parse(
        {
            "method": method,
            "models": entries,
            "base": str(base) if base is not None else None,
            "output": str(output),
            "options": settings,
            **own,
        }
    )
    return ModelMerger(config, **calls).merge(resume=resume, overwrite=overwrite)


def bytes_of(path: Path) -> dict[str, bytes]:
    """Return the weight files of a directory, byte for byte."""
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}
