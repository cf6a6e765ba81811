"""Float32 matrix products on a CPU, forward and backward, through oneDNN where that is faster than PyTorch's own.

PyTorch on x86 calls MKL, which on processors of another maker needs twice the time of oneDNN, which it has, too, and uses for 16
bits. Linear layers of a model get an autograd function, and so do the products with the vocabulary; whether oneDNN is faster is
measured once per process. Products are float32 in both, and differ by rounding. All else runs as ever: other devices and dtypes,
autocast, compiled code, small products, and the second of two derivatives.

Axes: N tokens, I inputs, O outputs of a layer; (n, k) · (k, m) elsewhere.
"""

from __future__ import annotations

import functools
import logging
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rlhf_core.infra.measured_choices import follow_record, note_choice

log = logging.getLogger(__name__)

MARGIN = 0.75
"""oneDNN is used where a layer's three products take at most this share of PyTorch's time. Far enough from 1 and from the half
that is found where it is faster, so that two runs on a machine decide alike: another decision would change the last bits. A
resumed run, and the other processes of one, take what was decided before."""
CHOICE = "float32 products in training"
"""What the choice is called in a run's record."""
LEAST_WORK = 2**22
"""Multiplications from which on a product is worth the calls from Python."""
BLOCK_BYTES = 8 * 2**20
"""Bytes of a result that is computed in blocks before it is copied: they stay in the cache, and the allocator keeps them."""


# Linear layers


def speed_up_linears(network: nn.Module) -> int:
    """Let a network's linear layers on a CPU use the faster products, in place; what they compute stays up to rounding.

    Returns:
        How many layers do, those of earlier calls included.
    """
    layers = [module for module in network.modules() if type(module) in (nn.Linear, Conv1D)]
    found = 0
    for layer in layers:
        if own_forward(layer) is None and getattr(layer.weight, "device", None) == torch.device("cpu"):
            layer.forward = types.MethodType(forward, layer)
            found += 1
        else:
            found += has_fast_products(layer)
    return found


def own_forward(module: nn.Module) -> Any:
    """Return the `forward` that was set on a module itself, not its class; None where there is none, or it is the class's."""
    found = vars(module).get("forward")
    # A pickled module comes back with its class's own set on itself.
    return None if getattr(found, "__func__", None) is type(module).forward else found


def has_fast_products(module: nn.Module) -> bool:
    """Tell whether a layer was changed by `speed_up_linears`."""
    return getattr(vars(module).get("forward"), "__func__", None) is forward


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a linear layer's output (…, O) for an input (…, I), through oneDNN where that suits the input and is faster.

    The function is set on a layer as a bound method named `forward`, so that a copy has a method bound to the copy, and a pickled
    layer finds its class's.
    """
    own, transposed = type(self).forward, type(self) is Conv1D
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return own(self, *args, **kwargs)
    x, weight, bias = args[0], self.weight, self.bias
    if not (
        _is_plain(x, weight, *(() if bias is None else (bias,)))
        and weight.ndim == 2
        and _is_dense(weight)
        and x.ndim >= 1
        and x.shape[-1] == weight.shape[0 if transposed else 1]
        and not torch.is_autocast_enabled("cpu")
        and _pays(x.numel() * weight.shape[1 if transposed else 0])
    ):
        return own(self, x)
    if torch.is_grad_enabled():
        # Flat: a result that a function returns as a view may not be changed in place, as some models do.
        flat: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, transposed)
        return flat.view(*x.shape[:-1], flat.shape[-1])
    return onednn_linear(x, weight.t() if transposed else weight, bias)


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b for x (N, I), W (O, I), b (O,) or None.

    With the upstream gradient g (N, O): d x = g W, d W = gᵀ x and d b = Σ g.
    With `transposed`, W is (I, O), as `Conv1D` keeps it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """Return y (N, O), and keep x and W where the other one needs a gradient."""
        x_learns, weight_learns = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if weight_learns else None, weight if x_learns else None)
        ctx.transposed = transposed
        return onednn_linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of x, W and b for the upstream gradient g (N, O); None for one that isn't trained."""
        x, weight = ctx.saved_tensors
        # Where a second derivative will be asked for, by operations that have one.
        product = torch.mm if torch.is_grad_enabled() else _product
        d_x = d_weight = d_bias = None
        with torch.autocast("cpu", enabled=False):
            if weight is not None:
                d_x = product(g, weight.t() if ctx.transposed else weight)
            if x is not None:
                d_weight = product(x.t(), g) if ctx.transposed else product(g.t(), x)
            if ctx.needs_input_grad[2]:
                d_bias = g.sum(0)
        return d_x, d_weight, d_bias, None


# Products of matrices, without gradients


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b (n, m) for a (n, k) and b (k, m) of one dtype, without gradients."""
    return _product(a, b) if _suits(a, b) else torch.mm(a, b)


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write a · b into `out` (n, m), and return that."""
    if not _suits(a, b):
        return torch.mm(a, b, out=out)
    # A result of hundreds of megabytes that is allocated for each call costs more in page faults than copies in the cache.
    width = max(1, BLOCK_BYTES // (out.element_size() * len(a)))
    for start in range(0, b.shape[1], width):
        out[:, start : start + width] = _product(a, b[:, start : start + width])
    return out


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a · b to `out` (n, m) in place, and return that."""
    if not _suits(a, b):
        return out.addmm_(a, b)
    height = max(1, BLOCK_BYTES // (out.element_size() * b.shape[1]))
    for start in range(0, len(a), height):
        out[start : start + height] += _product(a[start : start + height], b)
    return out


def _suits(a: Tensor, b: Tensor) -> bool:
    return _is_plain(a, b) and _pays(a.numel() * b.shape[1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b (n, m) by oneDNN, which copies a where it isn't contiguous."""
    return onednn_linear(a, b.t() if _is_dense(b) else b.t().contiguous())


def _is_dense(matrix: Tensor) -> bool:
    """Tell whether a matrix lies in memory without gaps, transposed or not; oneDNN has no fast code for other second operands."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x · weightᵀ + bias, (…, O) for x (…, I) and weight (O, I), packed or not, by oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


# When


def _is_plain(*tensors: Tensor) -> bool:
    """Tell whether tensors are ordinary float32 ones in a CPU's memory, and nothing but autograd watches what is computed."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu or tensor.dtype != torch.float32:
            return False
        if tensor.layout != torch.strided or not tensor.numel():
            return False
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _pays(work: int) -> bool:
    """Tell whether oneDNN is used for a product of that many multiplications."""
    return work >= LEAST_WORK and bool(torch._C._get_mkldnn_enabled()) and is_faster(torch.get_num_threads())


@functools.cache
def is_faster(threads: int) -> bool:
    """Tell whether oneDNN computes a layer's output and gradients faster than PyTorch does on this machine, and right.

    Args:
        threads: that PyTorch uses; the answer is kept for each number of them.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, g = (torch.randn(shape, generator=generator) for shape in ((64, 576), (768, 576), (64, 768)))
    pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor]] = [
        (lambda: onednn_linear(x, weight), lambda: F.linear(x, weight), x.double() @ weight.double().t()),
        (lambda: _product(g, weight), lambda: g @ weight, g.double() @ weight.double()),
        (lambda: _product(g.t(), x), lambda: g.t() @ x, g.double().t() @ x.double()),
    ]
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if any(float((ours().double() - exact).norm() / exact.norm()) > 1e-6 for ours, _, exact in pairs):
                note_choice(CHOICE, "PyTorch", reason="oneDNN's results are wrong", threads=threads)
                return False
            if (recorded := follow_record(CHOICE, threads=threads)) is not None:
                return recorded == "oneDNN"
            # Half a millisecond each, so that on a busy machine some are never interrupted.
            times = [least_seconds(ours, theirs, rounds=20) for ours, theirs, _ in pairs]
    except (AttributeError, RuntimeError, NotImplementedError):  # a build of PyTorch without oneDNN
        note_choice(CHOICE, "PyTorch", reason="this build of PyTorch has no oneDNN", threads=threads)
        return False
    share = sum(ours for ours, _ in times) / sum(theirs for _, theirs in times)
    log.debug("float32 products by oneDNN take %.2f of PyTorch's time with %d threads", share, threads)
    taken = "oneDNN" if share <= MARGIN else "PyTorch"
    note_choice(CHOICE, taken, share_of_time=round(share, 3), taken_up_to=MARGIN, threads=threads)
    return share <= MARGIN


def least_seconds(*works: Callable[[], Any], rounds: int = 8) -> list[float]:
    """Return the least time that each of several functions takes, called in turn so that a busy machine hinders all alike."""
    least = [float("inf")] * len(works)
    for _ in range(rounds):
        for number, work in enumerate(works):
            begin = time.perf_counter()
            work()
            least[number] = min(least[number], time.perf_counter() - begin)
    return least
