"""LoRA adapters as checkpoints: each tensor of the base with its update folded in, as it is read.

Hu et al. 2021, LoRA (arXiv 2106.09685), section 4.1: W = W₀ + s·B·A, with s = α / r, or α / √r for rank-stabilised adapters
(Kalajdzievski 2023, arXiv 2312.03732). Float32 throughout, and never through a copy of the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.errors import ModelError
from rlhf_core.merging.checkpoint import Checkpoint, FileSource, WeightFile, read_adapter_config
from rlhf_core.merging.streams import Source
from rlhf_core.merging.weights import LM_HEAD, is_embedding

_ODD = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with biases",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
}
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Starts of an adapter that leave the base's own weights as they are."""
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?$")


class AdapterCheckpoint(Checkpoint):
    """An adapter on its base."""

    def __init__(self, name: str, path: Path, base: Checkpoint) -> None:
        self.base, self.settings = base, read_adapter_config(path, name)
        self._check_settings(name)
        weights = path / "adapter_model.safetensors"
        if not weights.is_file():
            pickles = ", ".join(sorted(file.name for file in path.glob("*.bin")))
            raise ModelError(
                "the adapter has no adapter_model.safetensors; pickled weights can run code and are not loaded",
                place=name,
                got=pickles or "no weights",
                fix="save it again with `save_pretrained`, where you trust it",
            )
        file = WeightFile(weights, name)
        super().__init__(name, path, dict.fromkeys(file.entries, file))
        self.heads = self.heads or base.heads
        self._own = self.tensors
        self._pairs: dict[str, dict[str, str | None]] = {}
        self._whole: dict[str, str] = {}
        for key in self._own:
            self._take(key)
        self.tensors = dict(base.tensors)
        for target in self._whole:
            self._require(target, self._own[self._whole[target]].shape)
        for target in self._pairs:
            self._require(target, self._shape_of_update(target))

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys([*super().files, *self.base.files]))

    @property
    def config(self) -> dict[str, Any]:
        return self.base.config

    def close(self) -> None:
        super().close()
        self.base.close()

    def source(self, name: str) -> Source:
        whole = self._whole.get(name)
        plain: Source
        if whole is not None:
            plain = FileSource(self._files[whole], self._own[whole], name, self)
        else:
            plain = _Renamed(self.base.source(name), self)
        if name not in self._pairs:
            return plain
        left, right = self._factors(name)
        return LoraSource(plain, left, right, self)

    def _check_settings(self, name: str) -> None:
        given = self.settings
        odd = next((what for key, what in _ODD.items() if given.get(key)), None)
        if given.get("peft_type") != "LORA":
            odd = str(given.get("peft_type"))
        start = given.get("init_lora_weights", True)
        if odd is None and start not in _KEEPS_BASE:
            odd = f"init_lora_weights: {start}, which changes the base"
        if odd is not None:
            raise ModelError(
                "only plain LoRA adapters are folded while merging",
                place=name,
                got=odd,
                fix="fold it with peft's `merge_and_unload` and save the model",
            )

    def _take(self, key: str) -> None:
        """Note what one of the adapter's tensors belongs to."""
        inner = key.removeprefix(_PREFIX)
        if found := _PAIR.fullmatch(inner):
            sides = self._pairs.setdefault(self._target(f"{found['module']}.weight", key), {})
            sides[found["side"]] = key
            sides["embedding"] = found["embedding"]
        elif "lora_" not in inner:
            # A module that was trained and saved whole, or one with an update, saved beside it.
            self._whole[self._target(inner.replace(".base_layer.", "."), key)] = key
        else:
            raise ModelError(f"the adapter has a tensor that isn't understood: `{key}`", place=self.name)

    def _target(self, wanted: str, key: str) -> str:
        """Return the base's tensor of a name; the model's prefix may stand in one of the two names only."""
        prefixes = {name.split(".", 1)[0] + "." for name in self.base.tensors if "." in name}
        for name in (wanted, *(prefix + wanted for prefix in sorted(prefixes)), wanted.partition(".")[2]):
            if name in self.base.tensors:
                return name
        if any(piece in LM_HEAD for piece in wanted.split(".")):
            raise ModelError(
                "the adapter trains the output head, which its base ties to the embeddings and doesn't store",
                place=self.name,
                got=f"`{key}`",
                fix="fold it with peft's `merge_and_unload`, untied, and save the model",
            )
        raise ModelError(
            f"the adapter doesn't fit its base, which has no tensor `{wanted}`",
            place=self.name,
            got=f"`{key}` for base {self.base.name}",
            fix="set `base_model_name_or_path` in adapter_config.json to the model that it was trained on",
        )

    def _shape_of_update(self, target: str) -> tuple[int, ...]:
        sides = self._pairs[target]
        if not {"A", "B"} <= set(sides):
            raise ModelError(f"the adapter has one half of the update of `{target}` only", place=self.name)
        a, b = (self._own[str(sides[side])].shape for side in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ModelError(
                f"the halves of the update of `{target}` don't fit", place=self.name, got=f"{list(a)}, {list(b)}"
            )
        flip = bool(sides["embedding"]) or bool(self.settings.get("fan_in_fan_out"))
        return (a[1], b[0]) if flip else (b[0], a[1])

    def _require(self, target: str, found: tuple[int, ...]) -> None:
        expected = self.base.tensors[target].shape
        if found != expected and found[1:] == expected[1:] and is_embedding(target):
            raise ModelError(
                f"the adapter was trained with other tokens than its base has: tensor `{target}`",
                place=self.name,
                got=f"{found[0]} rows, the base {expected[0]}",
                fix="fold it with peft's `merge_and_unload` into the base with its tokens, and save the model",
            )
        if found != expected:
            raise ModelError(
                f"the adapter doesn't fit its base in tensor `{target}`",
                place=self.name,
                got=f"shape {list(found)}, the base {list(expected)}",
                fix="set `base_model_name_or_path` in adapter_config.json to the model that it was trained on",
            )

    def _factors(self, target: str) -> tuple[Tensor, Tensor]:
        """Return (rows, r) and (r, columns), whose product is the update, scaled."""
        sides = self._pairs[target]
        a, b = (_whole(self, str(sides[side])) for side in "AB")
        b *= self._scale(str(sides["A"]), a.shape[0])
        if sides["embedding"] or self.settings.get("fan_in_fan_out"):
            return a.T.contiguous(), b.T.contiguous()
        return b, a

    def _scale(self, key: str, rank: int) -> float:
        module = key.removeprefix(_PREFIX).rpartition(".lora_")[0]
        alpha = _by_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha", rank))
        return float(alpha) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


class LoraSource(Source):
    """A tensor of the base with its low-rank update."""

    def __init__(self, base: Source, left: Tensor, right: Tensor, owner: Checkpoint) -> None:
        self.base, self.left, self.right, self.owner = base, left, right, owner
        self.place, self.shape, self.dtype = owner.name, base.shape, base.dtype

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.base.read(start, stop, out)
        self._update(start, stop, out)

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        self.base.read_runs(starts, out)
        for start, row in zip(starts, out, strict=True):
            self._update(start, start + len(row), row)

    def _update(self, start: int, stop: int, out: Tensor) -> None:
        columns = self.right.shape[1]
        first, last = start // columns, -(-stop // columns)
        update = (self.left[first:last] @ self.right).view(-1)[start - first * columns : stop - first * columns]
        out.add_(update.to(out.device))

    def key(self) -> bytes:
        return self.owner.digest


class _Renamed(Source):
    """A tensor of the base as one of the adapter's."""

    def __init__(self, base: Source, owner: Checkpoint) -> None:
        self.base, self.owner = base, owner
        self.place, self.shape, self.dtype = owner.name, base.shape, base.dtype

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.base.read(start, stop, out)

    def read_runs(self, starts: Sequence[int], out: Tensor) -> None:
        self.base.read_runs(starts, out)

    def key(self) -> bytes:
        return self.owner.digest


def _whole(checkpoint: AdapterCheckpoint, key: str) -> Tensor:
    entry = checkpoint._own[key]
    source = FileSource(checkpoint._files[key], entry, key, checkpoint)
    values = torch.empty(entry.count)
    source.read(0, entry.count, values)
    return values.view(entry.shape)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value whose pattern ends a module's name, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
