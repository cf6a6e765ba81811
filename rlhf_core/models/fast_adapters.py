"""LoRA layers that compute their update in two products, for the many small forward passes of generation.

peft's own forward pass costs a small layer nearly as much as its product: it casts the input to float32 and back, and scales and
adds in passes of their own. Here the update is `output += (input · Aᵀ) · Bᵀ`, with A and B in the output's dtype and the scale
inside B. Layers that read the same input, such as q, k and v, share the first product. No base weight is copied or changed, so
tokens are drawn from the very weights that are trained, quantised ones too; merging would round small updates away in 16 bits.

Axes: N tokens, I inputs, O outputs, K rank (of all active adapters together).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_QUANTISED = {("peft.tuners.lora.bnb", "Linear4bit"), ("peft.tuners.lora.bnb", "Linear8bitLt")}
"""Classes of LoRA layers with a forward pass of their own that computes what peft's plain one does."""
_UPDATE = "_rlhf_low_rank_update"
"""Attribute of a LoRA layer with its `_Update`, which stays, so that a captured CUDA graph finds its tensors where they were."""


@contextlib.contextmanager
def fast_adapters(model: nn.Module) -> Iterator[int]:
    """Run a model's LoRA layers with fused updates inside the context; yield how many do.

    They compute with the adapters' weights as they are at the beginning of the context. A layer that does more than add a
    low-rank update runs as it always does: DoRA, adapters with biases or hooks or that are merged or off, dropout in training.
    So does a call with gradients or further arguments.
    """
    fused: list[Any] = []
    watch = _Watch()
    try:
        for layer in model.modules():
            if active := _plain_adapters(layer):
                if _UPDATE not in layer.__dict__:
                    layer.__dict__[_UPDATE] = _Update(layer)
                update: _Update = layer.__dict__[_UPDATE]
                update.begin(active, watch)
                layer.forward = update.forward
                fused.append(layer)
        updates = [layer.__dict__[_UPDATE] for layer in fused]
        for update in updates:
            update.leave_idle_group()
        for update in updates:
            update.group.refresh()
        yield len(fused)
    finally:
        watch.input = watch.group = None
        for layer in fused:
            del layer.forward
            layer.__dict__[_UPDATE].end()


def _plain_adapters(layer: Any) -> list[str]:
    """Return the names of a layer's active adapters where all they do is add a low-rank update; else none."""
    if not hasattr(layer, "lora_A"):
        return []
    from peft.tuners.lora import Linear, LoraLayer

    if not isinstance(layer, LoraLayer) or "forward" in layer.__dict__ or layer.merged or layer.disable_adapters:
        return []
    kind = type(layer)
    if kind.forward is not Linear.forward and (kind.__module__, kind.__qualname__) not in _QUANTISED:
        return []
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if any(type(part) is not nn.Linear or part.bias is not None for part in (down, up)):
            return []
        if any(type(part.weight) is not nn.Parameter for part in (down, up)):  # sharded, or computed from other tensors
            return []
        if name in layer.lora_variant or any(
            part._forward_hooks or part._forward_pre_hooks for part in (down, up, dropout)
        ):
            return []
        if dropout.training and not isinstance(dropout, nn.Identity):
            return []
    return active


class _Watch:
    """Which tensor was given to the LoRA layer that ran last: layers that are given the same one form a group."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.group: _Group | None = None


class _Group:
    """LoRA layers that read the same input, and so share the first product of their updates."""

    def __init__(self, member: _Update) -> None:
        self.members = [member]
        self._downs: dict[torch.dtype, Tensor] = {}
        self._input: Tensor | None = None
        self._version: float = 0
        self._product: Tensor | None = None

    def absorb(self, other: _Group) -> None:
        """Take another group's members."""
        for member in other.members:
            member.first = sum(each.rank for each in self.members)
            member.group = self
            self.members.append(member)
        self._downs.clear()
        self.forget()

    def refresh(self) -> None:
        """Copy the members' weights to where their products read them."""
        first = 0
        for member in self.members:
            member.first, first = first, first + member.rank
            member.refresh()
        for dtype in self._downs:
            self._fill(dtype)

    def forget(self) -> None:
        """Release the last input."""
        self._input = self._product = None

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x · Aᵀ (N, K of all members) for an input (..., I), computed once for all members."""
        shared = len(self.members) > 1
        known = self._product
        if x is self._input and known is not None and known.dtype == dtype and self._version == _version(x):
            return known
        if dtype not in self._downs:
            self._fill(dtype)
        found = torch.mm(x.reshape(-1, x.shape[-1]).to(dtype), self._downs[dtype]).to(dtype)
        if shared:
            self._input, self._version, self._product = x, _version(x), found
        return found

    def _fill(self, dtype: torch.dtype) -> None:
        wanted = torch.cat([down for member in self.members for down in member.downs]).t()  # (I, K)
        kept = self._downs.get(dtype)
        if kept is None or kept.shape != wanted.shape:
            self._downs[dtype] = wanted.to(dtype, copy=True).contiguous()
        else:
            kept.copy_(wanted)


class _Update:
    """The update of one LoRA layer by its active adapters."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._ordinary = layer, type(layer).forward
        self.group, self.first, self.rank = _Group(self), 0, 0
        self.downs: list[Tensor] = []
        self._ups: dict[torch.dtype, Tensor] = {}
        self._scaled: list[tuple[Tensor, float]] = []

    def begin(self, active: list[str], watch: _Watch) -> None:
        """Take these adapters' weights from now on."""
        layer = self._layer
        self.downs = [layer.lora_A[name].weight.detach() for name in active]  # (K, I) each
        self._scaled = [(layer.lora_B[name].weight.detach(), layer.scaling[name]) for name in active]  # (O, K) each
        self.rank, self._watch = sum(len(down) for down in self.downs), watch

    def leave_idle_group(self) -> None:
        """Begin a group of its own where a member of the present one has no adapter in this context, or left it before."""
        if any(not member.downs or member.group is not self.group for member in self.group.members):
            self.group, self.first = _Group(self), 0

    def end(self) -> None:
        """Release what is only read inside the context."""
        self.group.forget()
        self.downs, self._scaled = [], []

    def refresh(self) -> None:
        """Copy the adapters' second matrices, scaled, to where they are read."""
        for dtype in self._ups:
            self._fill(dtype)

    def _fill(self, dtype: torch.dtype) -> None:
        wanted = torch.cat([weight.t() * scale for weight, scale in self._scaled])  # (K, O)
        kept = self._ups.get(dtype)
        if kept is None or kept.shape != wanted.shape:
            self._ups[dtype] = wanted.to(dtype, copy=True).contiguous()
        else:
            kept.copy_(wanted)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (..., O) for an input (..., I)."""
        layer = self._layer
        if args or kwargs or torch.is_grad_enabled():
            return self._ordinary(layer, x, *args, **kwargs)
        output: Tensor = layer.base_layer(x)
        self._join(x)
        dtype = output.dtype
        down = self.group.product(x, dtype)[:, self.first : self.first + self.rank]
        if dtype not in self._ups:
            self._fill(dtype)
        if type(layer.base_layer) is nn.Linear and output.is_contiguous():  # a new tensor, that nobody else holds
            output.view(-1, output.shape[-1]).addmm_(down, self._ups[dtype])
            return output
        return output + torch.mm(down, self._ups[dtype]).to(dtype).view_as(output)

    def _join(self, x: Tensor) -> None:
        """Form one group with the layer that ran last, where it was given the same tensor."""
        watch = self._watch
        if watch.input is x and watch.group is not None and watch.group is not self.group:
            watch.group.absorb(self.group)
        watch.input, watch.group = x, self.group


def _version(x: Tensor) -> float:
    """Return how often a tensor was changed in place; not a number, which equals none, of one that doesn't count it."""
    return float("nan") if x.is_inference() else x._version
