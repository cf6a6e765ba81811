"""Mergers to try the contract on: sound ones, and broken ones with one fault each."""

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
    """Adds whole models to the base in place of differences."""

    api = 1
    needs_base = True

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return chunk.origin + super().merge_chunk(chunk, measured)


class IgnoresWeights(Linear):
    """Averages, whatever the weights."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        return weighted(chunk, [1 / len(chunk.tensors)] * len(chunk.tensors))


class FirstWins(Linear):
    """Takes the sign of the first model with a weight."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        first = next(tensor for tensor, weight in zip(chunk.tensors, chunk.weights, strict=True) if weight)
        return weighted(chunk, chunk.weights).abs() * first.sign()


class CountsPlaces(Linear):
    """Takes a millionth more of the model that is given first."""

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
    """Wants whole tensors, and returns them flat."""

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
    """Adds differences from a base, and doesn't say that it needs one."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        chunk.deltas()
        return chunk.origin + super().merge_chunk(chunk, measured)


class Divides(Linear):
    """Divides by the size of each model, and multiplies by it again."""

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
    """Divides by the sum of the weights, or not; and scales."""

    api = 1
    Config = ScaledConfig
    config: ScaledConfig

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        divisor = 1.0 if self.config.normalize is False else sum(chunk.weights)
        return super().merge_chunk(chunk, measured).mul_(self.factor() / divisor)

    def factor(self) -> float:
        return self.config.scale


class Unscaled(Scaled):
    """Accepts a scale, and leaves it aside."""

    api = 1

    def factor(self) -> float:
        return 1.0


class ByChunk(Linear):
    """Gives the mean the size of the models, but of each chunk by itself."""

    api = 1

    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        active = [tensor for tensor, weight in zip(chunk.tensors, chunk.weights, strict=True) if weight]
        size = sum(float(tensor.norm()) for tensor in active) / len(active)
        merged = super().merge_chunk(chunk, measured)
        return merged * (size / (float(merged.norm()) or 1.0))


class Remembers(Linear):
    """Scales by the largest value of the first tensor that it ever merged."""

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
    """Leaves a file in the directory of a model."""

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
    """Adds models up, each entry by its model's own file."""

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
    """Takes the first model's options for all."""

    api = 1

    def factors(self, chunk: Chunk) -> list[float]:
        return super().factors(chunk)[:1] * len(chunk.tensors)


class NextOnes(Masked):
    """Takes each time the options of the model after."""

    api = 1
    commutative = False

    def factors(self, chunk: Chunk) -> list[float]:
        first, *rest = super().factors(chunk)
        return [*rest[::-1], first]


class ByPlace(Masked):
    """Takes options by a model's place in the list, where it no longer stands."""

    api = 1

    def factors(self, chunk: Chunk) -> list[float]:
        found = super().factors(chunk)
        return [found[one.index] for one in chunk.inputs]


class Unread(Masked):
    """Accepts masks, and leaves them aside."""

    api = 1

    def factors(self, chunk: Chunk) -> list[float]:
        return [one.options["scale"] for one in chunk.inputs]


class Appends(Masked):
    """Writes into a model's options."""

    api = 1

    def factors(self, chunk: Chunk) -> list[float]:
        chunk.inputs[0].options["tags"].append("seen")
        return super().factors(chunk)
