"""The dtypes of a checkpoint's tensors: read where a model is loaded, and used again where it is saved.

Trained weights are float32 in memory whatever the checkpoint held; a model that came in bf16 is saved in bf16.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.infra.safetensors_file import header_entries

log = logging.getLogger(__name__)

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names of floating dtypes in a safetensors header."""


@dataclass
class SavedDtypes:
    """Dtypes of the floating tensors of a checkpoint, or of a model in memory."""

    main: torch.dtype = torch.float32
    """The dtype that holds most bytes."""
    others: dict[str, torch.dtype] = field(default_factory=dict)
    """Tensor name → dtype, for tensors of another dtype than `main`."""

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[torch.dtype, int]]) -> SavedDtypes:
        """Return the dtypes of named tensors, each given as its dtype and size; `main` is that of the largest total size."""
        sizes: Counter[torch.dtype] = Counter()
        for dtype, size in tensors.values():
            sizes[dtype] += size
        main = sizes.most_common(1)[0][0] if sizes else torch.float32
        return cls(main, {name: dtype for name, (dtype, _) in tensors.items() if dtype != main})

    @classmethod
    def in_memory(cls, model: nn.Module) -> SavedDtypes:
        """Return the dtypes of a model's own tensors."""
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        return cls.of({name: (t.dtype, t.numel()) for name, t in tensors.items() if t.is_floating_point()})

    @classmethod
    def on_disk(cls, directory: Path, pattern: str = "model*.safetensors") -> SavedDtypes | None:
        """Return the dtypes in a directory's safetensors files whose names match the pattern; None without such files."""
        tensors = {
            name: (_FLOATS[entry["dtype"]], entry["data_offsets"][1] - entry["data_offsets"][0])
            for file in sorted(directory.glob(pattern))
            for name, entry in header_entries(file).items()
            if entry.get("dtype") in _FLOATS
        }
        return cls.of(tensors) if tensors else None

    @property
    def lossless(self) -> torch.dtype:
        """The dtype in which all tensors can be loaded without losing a bit: `main` where all have it, else float32."""
        narrow = self.main in (torch.bfloat16, torch.float16)
        return self.main if not self.others and narrow else torch.float32

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which to save a tensor.

        Names agree where one of the two has a leading prefix that the other lacks, such as `model.`.
        """
        if not self.others:
            return self.main
        names = (name, name.partition(".")[2])
        found = next((self.others[n] for n in names if n in self.others), None)
        ends = (dtype for other, dtype in self.others.items() if other.partition(".")[2] == name)
        return found or next(ends, self.main)


def save_in_dtypes(model: Any, directory: Path, dtypes: SavedDtypes, **options: Any) -> bool:
    """Write a transformers or peft model by its `save_pretrained`, each tensor in its saved dtype.

    Args:
        model: of a peft model only what is trained, which is what peft saves, is converted.
        options: passed on to `save_pretrained`.

    Returns:
        Whether a tensor was saved in fewer bits than it has in memory.
    """
    adapter = hasattr(model, "peft_config") and hasattr(model, "disable_adapter")
    state = model.state_dict()
    kept = {name for name, p in model.named_parameters() if p.requires_grad} if adapter else state.keys()
    wrong = [n for n in kept & state.keys() if state[n].is_floating_point() and state[n].dtype != dtypes.dtype_of(n)]
    if not wrong or (not adapter and getattr(model, "is_quantized", False)):
        model.save_pretrained(directory, **options)
        return False
    cast = _cast({name: state[name] for name in state if name in kept}, dtypes)
    model.save_pretrained(directory, state_dict=state | cast, **options)
    if not adapter:
        _write_dtype(directory / "config.json", dtypes.main)
    return any(state[name].itemsize > dtypes.dtype_of(name).itemsize for name in wrong)


def _cast(state: Mapping[str, Any], dtypes: SavedDtypes) -> dict[str, Any]:
    """Return tensors in the dtypes that they are saved in; tensors that share memory still share it."""
    made: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
    out: dict[str, Any] = {}
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            out[name] = tensor
            continue
        key = (tensor.data_ptr(), tensor.shape, dtypes.dtype_of(name))
        if key not in made:
            made[key] = tensor.detach().to(key[2])
        out[name] = made[key]
    return out


def _write_dtype(config: Path, dtype: torch.dtype) -> None:
    """Set every `dtype` in a saved config.json to that of its weights: transformers writes the one that they had in memory."""
    short = str(dtype).removeprefix("torch.")

    def noted(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: short if k == "dtype" and isinstance(v, str) else noted(v) for k, v in values.items()}

    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(noted(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")
