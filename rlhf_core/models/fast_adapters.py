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

from rlhf_core.models.patches import holding, holds

_QUANTISED = {("peft.tuners.lora.bnb", "Linear4bit"), ("peft.tuners.lora.bnb", "Linear8bitLt")}
"""Classes of LoRA layers with a forward pass of their own that computes what peft's plain one does."""
_UPDATE = "_rlhf_low_rank_update"
"""Attribute of a LoRA layer with its `LowRankUpdate`. It stays: a captured CUDA graph finds its tensors where they were."""


@contextlib.contextmanager
def fast_adapters(model: nn.Module) -> Iterator[int]:
    """Run a model's LoRA layers with fused updates inside the context; yield how many do. See `FusedAdapters`."""
    with contextlib.closing(FusedAdapters(model)) as fused, fused.in_place() as count:
        yield count


class FusedAdapters:
    """Fused updates for a model's LoRA layers, with the adapters that are active, and their weights, as they are now.

    A layer that does more than add a low-rank update runs as it always does: DoRA, adapters with biases or hooks or that are
    merged or off, dropout in training. So does a call with gradients or further arguments, or in another thread.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watch = _Watch()
        self._layers: list[tuple[Any, list[str]]] = [
            (layer, active) for layer in model.modules() if (active := _plain_adapters(layer))
        ]
        self._begin()

    def _begin(self) -> None:
        for layer, active in self._layers:
            if _UPDATE not in layer.__dict__:
                layer.__dict__[_UPDATE] = LowRankUpdate(layer)
            layer.__dict__[_UPDATE].begin(active, self._watch)
        for update in self._updates:
            update.leave_idle_group()
        for update in self._updates:
            update.group.refresh()

    @property
    def _updates(self) -> list[LowRankUpdate]:
        return [layer.__dict__[_UPDATE] for layer, _ in self._layers]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[int]:
        """Use them inside the context, which costs little and may be entered again and again; yield how many layers do."""
        if any(update.watch is not self._watch for update in self._updates):  # others were in place meanwhile
            self._begin()
        placed = [layer for layer, _ in self._layers if "forward" not in layer.__dict__]
        try:
            for layer in placed:
                layer.__dict__["forward"] = layer.__dict__[_UPDATE].forward
            with holding(self._watch):
                yield len(self._layers)
        finally:
            self._watch.input = self._watch.group = None
            for layer in placed:
                layer.__dict__.pop("forward", None)
                layer.__dict__[_UPDATE].group.forget()

    def close(self) -> None:
        """Release the weights that they were made of."""
        for update in self._updates:
            if update.watch is self._watch:
                update.end()


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


def update_of(layer: nn.Module) -> LowRankUpdate | None:
    """Return a LoRA layer's fused update, in use or not; None where it never had one."""
    update: LowRankUpdate | None = layer.__dict__.get(_UPDATE)
    return update


def update_in_place(layer: nn.Module) -> LowRankUpdate | None:
    """Return the fused update that a LoRA layer runs with at the moment; None where it runs as it always does."""
    update = update_of(layer)
    return update if update is not None and layer.__dict__.get("forward") == update.forward else None


class _Watch:
    """Which tensor was given to the LoRA layer that ran last: layers that are given the same one form a group."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.group: _Group | None = None


class _Group:
    """LoRA layers that read the same input, and so share the first product of their updates."""

    def __init__(self, member: LowRankUpdate) -> None:
        self.members = [member]
        self._downs: dict[torch.dtype, Tensor] = {}
        self._input: Tensor | None = None
        self._version: float = 0
        self._dtype: torch.dtype | None = None
        self._products: dict[int, Tensor] = {}
        """Of the last input: a member's first column → its columns of the product."""

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
        self._input, self._products = None, {}

    def product(self, member: LowRankUpdate, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a member's x · Aᵀ (N, K) for an input (..., I), computed once for all members."""
        version = tensor_version(x)
        if x is self._input and dtype is self._dtype and version == self._version and member.first in self._products:
            return self._products[member.first]
        if dtype not in self._downs:
            self._fill(dtype)
        rows = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])
        found = torch.mm(rows if rows.dtype is dtype else rows.to(dtype), self._downs[dtype])
        if found.dtype is not dtype:
            found = found.to(dtype)
        if len(self.members) == 1:
            return found
        self._input, self._version, self._dtype = x, version, dtype
        self._products = {
            each.first: part
            for each, part in zip(self.members, found.split([each.rank for each in self.members], dim=1), strict=True)
        }
        return self._products[member.first]

    def _fill(self, dtype: torch.dtype) -> None:
        wanted = torch.cat([down for member in self.members for down in member.downs]).t()  # (I, K)
        kept = self._downs.get(dtype)
        if kept is None or kept.shape != wanted.shape:
            self._downs[dtype] = wanted.to(dtype, copy=True).contiguous()
        else:
            kept.copy_(wanted)


class LowRankUpdate:
    """The update of one LoRA layer by its active adapters."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._ordinary = layer, type(layer).forward
        self.group, self.first, self.rank = _Group(self), 0, 0
        self.downs: list[Tensor] = []
        """First matrix of each adapter, (K, I)."""
        self._ups: dict[torch.dtype, Tensor] = {}
        self._switches: tuple[Any, ...] = ()
        self.scaled: list[tuple[Tensor, float]] = []
        """Second matrix of each adapter, (O, K), and the factor of its product."""

    def begin(self, active: list[str], watch: _Watch) -> None:
        """Take these adapters' weights from now on."""
        layer = self._layer
        # Looked up once: a module looks its submodules up slowly, and one token passes hundreds of layers.
        self.base = layer.base_layer
        self._is_plain = type(self.base) is nn.Linear
        self.downs = [layer.lora_A[name].weight.detach() for name in active]  # (K, I) each
        self.scaled = [(layer.lora_B[name].weight.detach(), layer.scaling[name]) for name in active]  # (O, K) each
        self.rank, self.watch = sum(len(down) for down in self.downs), watch
        self._switches = _switches(layer)

    def is_current(self) -> bool:
        """Tell whether the adapters taken are still those that are on; somebody else may switch them meanwhile."""
        return self._switches == _switches(self._layer)

    def leave_idle_group(self) -> None:
        """Begin a group of its own where a member of the present one has no adapter in this context, or left it before."""
        if any(not member.downs or member.group is not self.group for member in self.group.members):
            self.group, self.first = _Group(self), 0

    def end(self) -> None:
        """Release what is only read inside the context."""
        self.group.forget()
        self.downs, self.scaled = [], []

    def refresh(self) -> None:
        """Copy the adapters' second matrices, scaled, to where they are read."""
        for dtype in self._ups:
            self._fill(dtype)

    def _fill(self, dtype: torch.dtype) -> Tensor:
        wanted = torch.cat([weight.t() * scale for weight, scale in self.scaled])  # (K, O)
        kept = self._ups.get(dtype)
        if kept is None or kept.shape != wanted.shape:
            kept = self._ups[dtype] = wanted.to(dtype, copy=True).contiguous()
        else:
            kept.copy_(wanted)
        return kept

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (..., O) for an input (..., I)."""
        if args or kwargs or torch.is_grad_enabled() or not holds(self.watch) or not self.is_current():
            return self._ordinary(self._layer, x, *args, **kwargs)
        output: Tensor = self.base(x)
        watch = self.watch
        if watch.input is not x or watch.group is not self.group:
            self._join(x)
        dtype = output.dtype
        down = self.group.product(self, x, dtype)
        up = self._ups.get(dtype)
        if up is None:
            up = self._fill(dtype)
        # A new tensor that nobody else holds, or such a tensor's columns for this layer.
        if self._is_plain and (output.is_contiguous() or (output.dim() == 3 and len(output) == 1)):
            output.view(-1, output.shape[-1]).addmm_(down, up)
            return output
        return output + torch.mm(down, up).to(dtype).view_as(output)

    def _join(self, x: Tensor) -> None:
        """Form one group with the layer that ran last, where it was given the same tensor."""
        watch = self.watch
        if watch.input is x and watch.group is not None and watch.group is not self.group:
            watch.group.absorb(self.group)
        watch.input, watch.group = x, self.group


def _switches(layer: Any) -> tuple[Any, ...]:
    """Return which of a LoRA layer's adapters are on, in an instant: its attributes, without the properties around them."""
    active = layer._active_adapter
    return layer._disable_adapters, (active if isinstance(active, str) else tuple(active)), tuple(layer.merged_adapters)


def tensor_version(x: Tensor) -> float:
    """Return how often a tensor was changed in place; not a number, which equals none, of one that doesn't count it."""
    return float("nan") if x.is_inference() else x._version
