"""Inputs of merges for tests, a merge of one tensor, and how near it must be to what was computed in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf_core import registry
from rlhf_core.merging import CHUNK, Merger, merge_tensor

Array = numpy.ndarray

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(300_007,), (1024, 150), (3, 40, 33), (33,), (1,), ()]
"""More than one chunk, odd and even, in one, two and three dimensions; single elements."""


def make_inputs(shape: tuple[int, ...], models: int = 3, *, seed: int = 0, bits: int = 16) -> list[Tensor]:
    """Return a base, then the models: values and differences are multiples of 2⁻ᵇⁱᵗˢ, so float32 holds both exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale * 2**bits).round() / 2**bits

    base = normal(1.0)
    return [base, *(base + normal(0.1) for _ in range(models))]


@functools.cache
def merger_class(method: str) -> type[Merger]:
    return registry.get("merger", method)


def make_merger(method: str, **options: Any) -> Merger:
    cls = merger_class(method)
    return cls(cls.Config.parse(options))


def merge(
    method: str,
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Sequence[float],
    *,
    each: Sequence[Mapping[str, Any]] = (),
    chunk: int = CHUNK,
    name: str = NAME,
    **options: Any,
) -> Tensor:
    """Merge one tensor; `each` holds each model's own options."""
    merger = make_merger(method, **options)
    return merge_tensor(merger, models, weights, base=base, options=each, name=name, chunk=chunk)


def doubles(tensors: Sequence[Tensor]) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


def check_near(found: Tensor, expected: Array, unclear: Array | None = None) -> None:
    """Fail where an element is off by more than 5e-7 of the largest, but for those that rounding may decide."""
    apart = numpy.abs(found.double().numpy() - expected)
    if unclear is not None:
        assert unclear.mean() < 0.001
        apart = numpy.where(unclear, 0.0, apart)
    assert apart.max() <= 5e-7 * numpy.abs(expected).max()


def check_bf16(
    method: str, reference: Callable[[list[Array], list[float]], Array], weights: list[float], **options: Any
) -> None:
    """Merge bf16 models: fewer than 0.2 % of the elements may be another bf16 than the float64 result is rounded to."""
    base, *models = (tensor.bfloat16() for tensor in make_inputs((512, 200), len(weights), seed=5))
    found = merge(method, base, models, weights, **options).bfloat16()
    expected = torch.from_numpy(reference(doubles([base, *models]), weights)).bfloat16()
    assert float((found != expected).float().mean()) < 0.002


def kept_of(method: str, base: Tensor, model: Tensor, **options: Any) -> Array:
    """Return which entries of a model's task vector a merge leaves, asked of it alone."""
    alone = {**options, "election": "none", "scale": 1.0, "normalize": False}
    return (merge(method, base, [model], [1.0], **alone) != base).numpy()
