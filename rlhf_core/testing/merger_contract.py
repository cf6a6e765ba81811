"""What every merger promises, as tests to inherit.

class TestBlend(MergerContract):
    method = "acme-blend"  # a registered name, or `merger = BlendMerger`
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor

from rlhf_core.errors import ConfigError
from rlhf_core.interfaces import Merger
from rlhf_core.testing.contract import Contract, after, require

NAME = "model.layers.0.mlp.up_proj.weight"
INPUTS = "test_inputs_are_left_alone"


class MergerContract(Contract):
    """The conformance tests of a merger that works tensor by tensor.

    A base is always given. A merger that refuses weights that differ, in `check_weights`, is tested with equal ones.
    """

    kind = "merger"
    merger: ClassVar[type[Merger] | None] = None
    """The class under test, in place of `method`."""
    models: ClassVar[int] = 3
    """Models that are merged, as far as the merger takes so many."""
    shape: ClassVar[tuple[int, ...]] = (24, 16)
    tolerance: ClassVar[float] = 1e-5
    """Largest difference, as a share of the largest value, that rounding may make in float32."""

    def instance(self, *, neutral: bool = False) -> Merger:
        """Return a new merger with `options`, and where `neutral`, the merger's `neutral` ones over them."""
        subject, config = self._found
        return subject(config.updated(**subject.neutral) if neutral and subject.neutral else config)

    @functools.cached_property
    def _found(self) -> tuple[type[Merger], Any]:
        # Looked up once a test: each search for plugins takes a while.
        return self.subject(), self.config()

    def count(self) -> int:
        """Return how many models are merged: `models`, or the nearest number that the merger takes."""
        fewest, most = self._found[0].models
        return max(fewest, self.models if most is None else min(self.models, most))

    def tensors(self, *, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return a base, then one tensor a model: the base with differences of a tenth of its size."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(shape or self.shape, generator=generator)
        moved = [base + 0.1 * torch.randn(base.shape, generator=generator) for _ in range(self.count())]
        return [tensor.to(dtype) for tensor in (base, *moved)]

    def weights(self) -> list[float]:
        """Return weights that sum to one: unequal ones where the merger takes them."""
        count = self.count()
        unequal = [2 * (number + 1) / (count * (count + 1)) for number in range(count)]
        try:
            self.instance().check_weights(unequal)
        except ConfigError:
            return [1 / count] * count
        return unequal

    def same(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Fail unless two tensors are equal within `tolerance`."""
        require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        error = float((found - expected.float()).abs().max() / expected.float().abs().max())
        require(
            error <= self.tolerance,
            f"{what}: off by {error:.1e} of the largest value ({self.tolerance:.0e} is allowed)",
        )

    def test_copies_of_one_model_give_that_model(self) -> None:
        """Models that are all one merge into it: into the base where it is the base, else into that model. `neutral` counts."""
        base, model, *_ = self.tensors()
        for one, what in ((base, "the base's copies"), (model, "a model's copies")):
            copies = [one.clone() for _ in range(self.count())]
            self.same(self.instance(neutral=True).merge_tensor(NAME, base, copies, self.weights()), one, what)

    @after(INPUTS)
    def test_weights_one_and_zero_select(self) -> None:
        """A model of weight one among models of weight zero comes out as it is. `neutral` counts."""
        base, *tensors = self.tensors()
        for chosen, tensor in enumerate(tensors):
            weights = [float(number == chosen) for number in range(self.count())]
            try:
                self.instance().check_weights(weights)
            except ConfigError as error:
                raise SkipTest(f"the merger takes no such weights: {error}") from None
            found = self.instance(neutral=True).merge_tensor(NAME, base, tensors, weights)
            self.same(found, tensor, f"weights {weights}")

    @after(INPUTS)
    def test_order_of_models_changes_nothing(self) -> None:
        """Models in another order, their weights with them, give the same tensor."""
        base, *tensors = self.tensors()
        weights = self.weights()
        expected = self.instance().merge_tensor(NAME, base, tensors, weights)
        for shift in range(1, self.count()):
            order = [*range(shift, self.count()), *range(shift)]
            moved, theirs = [tensors[number] for number in order], [weights[number] for number in order]
            self.same(self.instance().merge_tensor(NAME, base, moved, theirs), expected, "in another order")

    def test_shape_is_kept_in_float32(self) -> None:
        """Tensors of any shape and dtype merge into float32 of that shape, with finite values; a model of another is an error."""
        for shape in (self.shape, (7,), (2, 3, 4), (1,)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                base, *tensors = self.tensors(shape=shape, dtype=dtype)
                merged = self.instance().merge_tensor(NAME, base, tensors, self.weights())
                what = f"from {dtype} {shape}".replace("torch.", "")
                require(tuple(merged.shape) == shape, f"{what}: shape {tuple(merged.shape)}")
                require(merged.dtype == torch.float32, f"{what}: {merged.dtype}, not float32")
                require(bool(merged.isfinite().all()), f"{what}: values that aren't finite")
        base, *tensors = self.tensors()
        if self.count() < 2:
            return
        try:
            self.instance().merge_tensor(NAME, base, [*tensors[:-1], tensors[-1].T.contiguous()], self.weights())
        except Exception:
            return
        require(False, f"models of shapes {self.shape} and {self.shape[::-1]} are merged without an error")

    def test_inputs_are_left_alone(self) -> None:
        """Merging changes none of its inputs."""
        base, *tensors = self.tensors()
        before = [tensor.clone() for tensor in (base, *tensors)]
        self.instance().merge_tensor(NAME, base, tensors, self.weights())
        changed = [n for n, (old, new) in enumerate(zip(before, (base, *tensors), strict=True)) if not old.equal(new)]
        names = ["the base" if number == 0 else f"model {number - 1}" for number in changed]
        require(not names, f"merging changes {', '.join(names)}")

    @after(INPUTS)
    def test_the_same_inputs_give_the_same_bits(self) -> None:
        """Merging again gives the same tensor, whatever else drew random numbers."""
        base, *tensors = self.tensors()
        first = self.instance().merge_tensor(NAME, base, tensors, self.weights())
        torch.rand(1)
        require(self.instance().merge_tensor(NAME, base, tensors, self.weights()).equal(first), "another tensor")
