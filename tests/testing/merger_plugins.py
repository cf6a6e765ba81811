"""Mergers to test the contract with: correct ones, and ones with one fault each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf_core.config.base import BaseConfig
from rlhf_core.merging import Chunk, Merger


class Linear(Merger):
    """Adds weighted tensors up."""

    api = 1
    commutative = True

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return weighted(chunk, chunk.weights)


def weighted(chunk: Chunk, weights: Sequence[float]) -> Tensor:
    merged = torch.zeros_like(chunk.tensors[0])
    for tensor, weight in zip(chunk.tensors, weights, strict=True):
        merged += weight * tensor
    return merged


class AddsToBase(Linear):
    """Adds whole models to the base instead of task vectors."""

    api = 1
    needs_base = True

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return chunk.origin + super().merge_chunk(chunk, measured)


class IgnoresWeights(Linear):
    """Averages the models and ignores the weights."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return weighted(chunk, [1 / len(chunk.tensors)] * len(chunk.tensors))


class FirstWins(Linear):
    """Gives entries the sign of the first model whose weight isn't 0."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        first = next(tensor for tensor, weight in zip(chunk.tensors, chunk.weights, strict=True) if weight)
        return weighted(chunk, chunk.weights).abs() * first.sign()


class CountsPlaces(Linear):
    """Weighs the model that is given first a millionth more."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return weighted(
            chunk,
            [weight * (1 + 1e-6 * (one.index == 0)) for one, weight in zip(chunk.inputs, chunk.weights, strict=True)],
        )


class Doubles(Linear):
    """Returns float64."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return super().merge_chunk(chunk, measured).double()


class Flattens(Linear):
    """Asks for whole tensors and returns them flat."""

    api = 1
    chunk_shape = "tensor"

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return super().merge_chunk(chunk, measured).reshape(-1)


class Drops(Linear):
    """Drops differences at random, from the global generator."""

    api = 1
    needs_base = True

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        merged = super().merge_chunk(chunk, measured)
        active = sum(1 for weight in chunk.weights if weight)
        # A draw an entry: two draws for the whole may be too near each other to change a bit.
        keep = torch.rand(merged.shape) if active > 1 else torch.ones(())
        return chunk.origin + (1 - 1e-6 * keep) * (merged - chunk.origin)


class NeedsBase(Linear):
    """Needs a base and doesn't declare it."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        chunk.deltas()
        return chunk.origin + super().merge_chunk(chunk, measured)


class Divides(Linear):
    """Divides by the norm of each model and multiplies by it again, which fails for zeros."""

    api = 1
    chunk_shape = "tensor"

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        sizes = [float(tensor.norm()) for tensor in chunk.tensors]
        for tensor, size in zip(chunk.tensors, sizes, strict=True):
            tensor.div_(size)
        return weighted(chunk, [weight * size for weight, size in zip(chunk.weights, sizes, strict=True)])


class ScaledConfig(BaseConfig):
    """Options of scaled sums."""

    normalize: bool | None = Field(None, description="Divide by the sum of the weights; null does so, too.")
    scale: float = Field(1.0, description="Factor of the sum; larger makes it larger.")


class Scaled(Linear):
    """Divides by the sum of the weights where asked to, and scales."""

    api = 1
    Config = ScaledConfig
    config: ScaledConfig

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        divisor = 1.0 if self.config.normalize is False else sum(chunk.weights)
        return super().merge_chunk(chunk, measured).mul_(self.factor() / divisor)

    def factor(self) -> float:
        return self.config.scale


class Unscaled(Scaled):
    """Ignores its option `scale`."""

    api = 1

    def factor(self) -> float:
        return 1.0


class ByChunk(Linear):
    """Rescales the mean to the norm of the models, chunk by chunk instead of over the tensor."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        active = [tensor for tensor, weight in zip(chunk.tensors, chunk.weights, strict=True) if weight]
        size = sum(float(tensor.norm()) for tensor in active) / len(active)
        merged = super().merge_chunk(chunk, measured)
        return merged * (size / (float(merged.norm()) or 1.0))


class Remembers(Linear):
    """Adds a number that depends on the first tensor that it merged."""

    api = 1
    needs_base = True
    largest: float | None = None

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        if self.largest is None:
            self.largest = float(chunk.origin.abs().max())
        merged = super().merge_chunk(chunk, measured)
        active = sum(1 for weight in chunk.weights if weight)
        return merged if active < 2 or chunk.tensors[0].equal(chunk.tensors[1]) else merged + 1e-6 * self.largest


class Leaves(Linear):
    """Writes a file into the directory of a model."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        for one in chunk.inputs:
            if one.path is not None:
                (one.path / "norms.json").write_text("{}")
        return super().merge_chunk(chunk, measured)


class MaskedConfig(BaseConfig):
    """Options of masked sums."""

    scale: float = Field(1.0, description="Factor of a model; larger counts more.")
    power: Literal["one", "two"] = Field("one", description="Whether a mask is taken once or twice.")
    mask: Path | None = Field(None, description="File with what each entry of a model counts, between 0 and 1.")
    tags: list[str] = Field(default_factory=list, description="Names for a model; `flip` turns its sign.")


class Masked(Linear):
    """Adds models up, each scaled by a factor from a file of the model."""

    api = 1
    Config = MaskedConfig
    config: MaskedConfig
    per_model = ("scale", "power", "mask", "tags")

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return weighted(
            chunk, [weight * factor for weight, factor in zip(chunk.weights, self.factors(chunk), strict=True)]
        )

    def factors(self, chunk: Chunk) -> list[float]:
        found = []
        for one in chunk.inputs:
            mask = float(one.options["mask"].read_text()) if one.options["mask"] else 1.0
            sign = -1 if "flip" in one.options["tags"] else 1
            found.append(sign * one.options["scale"] * mask ** (2 if one.options["power"] == "two" else 1))
        return found


class OneForAll(Masked):
    """Uses the first model's options for all models."""

    api = 1

    def factors(self, chunk: Chunk) -> list[float]:
        return super().factors(chunk)[:1] * len(chunk.tensors)


class NextOnes(Masked):
    """Uses for each model the options of another one."""

    api = 1
    commutative = False

    def factors(self, chunk: Chunk) -> list[float]:
        first, *rest = super().factors(chunk)
        return [*rest[::-1], first]


class ByPlace(Masked):
    """Looks options up by the position at which a model was given, though the core has sorted the models."""

    api = 1

    def factors(self, chunk: Chunk) -> list[float]:
        found = super().factors(chunk)
        return [found[one.index] for one in chunk.inputs]


class Unread(Masked):
    """Ignores its options `power` and `mask`."""

    api = 1

    def factors(self, chunk: Chunk) -> list[float]:
        return [one.options["scale"] for one in chunk.inputs]


class Appends(Masked):
    """Writes into a model's options."""

    api = 1

    def factors(self, chunk: Chunk) -> list[float]:
        chunk.inputs[0].options["tags"].append("seen")
        return super().factors(chunk)
