"""What every merger promises, as tests to inherit.

class TestBlend(MergerContract):
    method = "acme-blend"  # a registered name, or `merger = BlendMerger`
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlhf_core.interfaces import Merger
from rlhf_core.testing.contract import Contract, after, require

NAME = "model.layers.0.mlp.up_proj.weight"
INPUTS = "test_inputs_are_left_alone"


class MergerContract(Contract):
    """The conformance tests of a merger that works tensor by tensor."""

    kind = "merger"
    merger: ClassVar[type[Merger] | None] = None
    """The class under test, in place of `method`."""
    models: ClassVar[int] = 3
    """Models that are merged; 2 for a method that takes no more."""
    shape: ClassVar[tuple[int, ...]] = (24, 16)
    tolerance: ClassVar[float] = 1e-5
    """Largest difference, as a share of the largest value, that rounding may make in float32."""

    def instance(self) -> Merger:
        """Return a new merger with `options`."""
        return self.subject()(self.config())

    def tensors(self, *, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return a base, then one tensor a model: the base with differences of a tenth of its size."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(shape or self.shape, generator=generator)
        moved = [base + 0.1 * torch.randn(base.shape, generator=generator) for _ in range(self.models)]
        return [tensor.to(dtype) for tensor in (base, *moved)]

    def weights(self) -> list[float]:
        """Return unequal weights that sum to one."""
        total = self.models * (self.models + 1) / 2
        return [(number + 1) / total for number in range(self.models)]

    def same(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Fail unless two tensors are equal within `tolerance`."""
        require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        error = float((found - expected.float()).abs().max() / expected.float().abs().max())
        require(
            error <= self.tolerance,
            f"{what}: off by {error:.1e} of the largest value ({self.tolerance:.0e} is allowed)",
        )

    def test_copies_of_one_model_give_that_model(self) -> None:
        """Models that are all the base merge into the base."""
        base, *_ = self.tensors()
        merged = self.instance().merge_tensor(NAME, base, [base.clone() for _ in range(self.models)], self.weights())
        self.same(merged, base, "copies")

    @after(INPUTS)
    def test_weights_one_and_zero_select(self) -> None:
        """A model of weight one among models of weight zero comes out as it is."""
        base, *tensors = self.tensors()
        for chosen, tensor in enumerate(tensors):
            weights = [float(number == chosen) for number in range(self.models)]
            self.same(self.instance().merge_tensor(NAME, base, tensors, weights), tensor, f"weights {weights}")

    @after(INPUTS)
    def test_order_of_models_changes_nothing(self) -> None:
        """Models in another order, their weights with them, give the same tensor."""
        base, *tensors = self.tensors()
        weights = self.weights()
        expected = self.instance().merge_tensor(NAME, base, tensors, weights)
        found = self.instance().merge_tensor(NAME, base, tensors[::-1], weights[::-1])
        self.same(found, expected, "in another order")

    def test_shape_is_kept_in_float32(self) -> None:
        """Tensors of any shape and dtype merge into float32 of that shape, with finite values."""
        for shape in (self.shape, (7,), (2, 3, 4), (1,)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                base, *tensors = self.tensors(shape=shape, dtype=dtype)
                merged = self.instance().merge_tensor(NAME, base, tensors, self.weights())
                what = f"from {dtype} {shape}".replace("torch.", "")
                require(tuple(merged.shape) == shape, f"{what}: shape {tuple(merged.shape)}")
                require(merged.dtype == torch.float32, f"{what}: {merged.dtype}, not float32")
                require(bool(merged.isfinite().all()), f"{what}: values that aren't finite")

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
