"""Linear layers of a float32 model on a CPU through oneDNN, where that is faster than what PyTorch calls.

PyTorch multiplies float32 matrices with the library that it was built with, which is MKL on x86. On processors of another maker
oneDNN, which is in PyTorch too, needs half the time for the same products of the same weights; which is faster is measured.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MARGIN = 0.9
"""oneDNN is used where it needs at most this share of the time."""


@contextlib.contextmanager
def fast_linears(network: nn.Module) -> Iterator[None]:
    """Let a network's linear layers, inside the context, call oneDNN where it is faster; without gradients and autocast.

    Weights are read where they are. Layers of other types, dtypes and devices stay as they are.
    """
    layers: list[Any] = [
        module
        for module in network.modules()
        if type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.is_contiguous()
    ]
    if not layers or not _is_faster(torch.get_num_threads()):
        yield
        return
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, layer.weight, layer.bias)
    return _product(x, layer.weight, layer.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x · weightᵀ + bias, (..., out) for x (..., in) and weight (out, in), by oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@functools.cache
def _is_faster(threads: int) -> bool:
    """Tell whether oneDNN multiplies float32 matrices of a decoding step faster on this machine, and rightly.

    Args:
        threads: that PyTorch uses; the answer is kept for each number of them.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 768, generator=generator) for rows in (64, 1536))
    try:
        with torch.no_grad():
            expected = x.double() @ weight.double().T
            difference = float((_product(x, weight) - expected).norm() / expected.norm())
            return difference < 1e-5 and _seconds(lambda: _product(x, weight)) < MARGIN * _seconds(
                lambda: F.linear(x, weight)
            )
    except (AttributeError, RuntimeError, NotImplementedError):  # a build of PyTorch without oneDNN
        return False


def _seconds(work: Callable[[], Any]) -> float:
    """Return the least time that one of eight calls takes."""
    least = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - begin)
    return least
