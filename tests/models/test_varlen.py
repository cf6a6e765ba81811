"""PyTorch's own variable-length kernel is used where it is right, and nowhere else; what can be known of it without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_forward import varlen_reference
from torch import Tensor

from rlhf_core.models.attention import kernel_obstacle, torch_varlen
from rlhf_core.models.layout import Segment, Segments
from rlhf_core.models.segment_attention import attend_varlen

CPU = torch.device("cpu")


def obstacle(kernel: Callable[..., Tensor], precision: torch.dtype = torch.float32) -> str | None:
    return kernel_obstacle(kernel, CPU, precision, 4, 2, 16)


def test_a_kernel_that_is_right_is_taken() -> None:
    assert obstacle(varlen_reference) is None
    assert obstacle(varlen_reference, torch.bfloat16) is None


def top_left(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *rest: Any, **options: Any) -> Tensor:
    """As a kernel whose causal mask is aligned to the beginning of the keys: the other convention."""
    ends = torch.minimum(k_starts[1:], k_starts[:-1] + q_starts.diff())
    index = torch.cat([torch.arange(a, b) for a, b in zip(k_starts[:-1], ends, strict=True)])
    return varlen_reference(q, k[index], v[index], q_starts, q_starts, *rest, **options)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        return 1.1 * upstream


def test_one_that_differs_or_raises_is_not() -> None:
    def wrong_gradient(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        return varlen_reference(WrongGradient.apply(q), *rest, **options)

    def missing(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("no kernel here\nand more")

    assert "output differs by" in str(obstacle(top_left))
    assert "queries differ in their gradient by" in str(obstacle(wrong_gradient))
    assert (
        obstacle(lambda *given, **options: varlen_reference(*given, **options) * torch.nan)
        == "its output differs by nan"
    )
    assert obstacle(missing) == "NotImplementedError: no kernel here"
    assert obstacle(torch_varlen) is not None  # PyTorch's own doesn't run on a CPU


def test_the_operator_has_these_arguments_and_a_backward_pass() -> None:
    """On the device `meta`, where shapes are computed and nothing else."""
    segments = Segments([Segment(0, 5), Segment(5, 3, 0, 5), Segment(8, 7, 0, 5)])
    shapes = ((1, 4, 15, 16), (1, 2, 15, 16), (1, 2, 15, 16))
    inputs = [torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:  # autocast doesn't know `meta`
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        attend = functools.partial(attend_varlen, kernel=torch_varlen)
        out = attend(*inputs, segments, scale=0.25)
    assert out.shape == (1, 15, 4, 16)
    out.sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
