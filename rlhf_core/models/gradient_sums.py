"""Gradients of a step's micro-batches, added to `Parameter.grad` where they are computed.

Autograd gives each product's gradient memory of its own and adds it to the others later. For the vocabulary's weights, which the
input and the output use, that is hundreds of megabytes written and read for every micro-batch, whatever its size. Inside
`summing_in_place`, functions that know better add what they compute to the parameter's gradient themselves, and return none.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from rlhf_core.models.cpu_products import own_forward


class _Here(threading.local):
    """Whether this thread runs a backward pass whose gradients all end in `Parameter.grad`; on a CPU all of it runs in here."""

    summing = False


_here = _Here()


@contextlib.contextmanager
def summing_in_place() -> Iterator[None]:
    """Let functions add to `Parameter.grad` themselves in a call of `Tensor.backward`; not for `torch.autograd.grad`."""
    before, _here.summing = _here.summing, True
    try:
        yield
    finally:
        _here.summing = before


def open_gradient(parameter: Tensor) -> Tensor | None:
    """Return the gradient of a parameter, to be added to in place; None where autograd must get what is to be added.

    That is outside `summing_in_place`, and where a hook waits for the gradient, or a second derivative is asked for.
    """
    if not _here.summing or torch.is_grad_enabled() or not parameter.is_leaf or not parameter.is_cpu:
        return None
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad if parameter.grad.layout == torch.strided else None


# Embeddings


class _Embedding(torch.autograd.Function):
    """Rows of W (V, D) at ids (…); d W is the sum of the upstream gradient (…, D) over the places of each id."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        """Return (…, D); `padding` is the id whose row gets no gradient."""
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor | None, None]:
        """Return d W (V, D), or None where it was added to W's gradient."""
        (ids,) = ctx.saved_tensors
        ids, rows = ids.reshape(-1), upstream.reshape(-1, upstream.shape[-1])
        if ctx.padding is not None:
            rows = rows[ids != ctx.padding]
            ids = ids[ids != ctx.padding]
        into = open_gradient(ctx.weight)
        if into is not None:
            into.index_add_(0, ids, rows.to(into.dtype))
            return None, None, None
        return None, torch.zeros_like(ctx.weight).index_add(0, ids, rows.to(ctx.weight.dtype)), None


def sum_embeddings_in_place(network: nn.Module) -> None:
    """Let a network's embeddings on a CPU add to their gradient themselves, in place; what they compute stays."""
    for module in network.modules():
        if type(module) is nn.Embedding and own_forward(module) is None:
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def forward(self: nn.Embedding, *args: Any, **kwargs: Any) -> Tensor:
    """Return an embedding's rows (…, D) for ids (…).

    Set on a layer as a bound method named `forward`, so that a copy has a method bound to the copy, and a pickled layer finds its
    class's.
    """
    weight = self.weight
    if (
        len(args) == 1
        and not kwargs
        and torch.is_grad_enabled()
        and weight.requires_grad
        and weight.is_cpu
        and type(weight) is nn.Parameter
        and self.max_norm is None
        and not (self.sparse or self.scale_grad_by_freq)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    ):
        found: Tensor = _Embedding.apply(args[0], weight, self.padding_idx)
        return found
    return nn.Embedding.forward(self, *args, **kwargs)
