"""Linear layers on a CPU for the many small forward passes of generation: through oneDNN, over weights in the order it reads.

Weights are packed once, where oneDNN would bring them into its own order in each product. Layers that read the same input, such
as q, k and v, are one product, and their input is cast once. For float32, PyTorch on x86 calls MKL, which needs twice oneDNN's
time on processors of another maker. Whether packed products are faster at all is measured. Where a processor has no instructions
for bf16 or fp16, its products of such numbers run in float32, and are rounded as they would be.

Where layers have LoRA adapters, all first matrices of a group are one product more, and all second ones another.

Packed weights are a copy, made from the layers' own when tokens are drawn, and thrown away as soon as those change.

Axes: N tokens, I inputs, O outputs, K rank.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rlhf_core.infra.host_memory import available_bytes
from rlhf_core.infra.measured_choices import follow_record, note_choice
from rlhf_core.models.cpu_products import (
    forward,
    has_fast_products,
    is_faster,
    least_seconds,
    onednn_linear,
    own_forward,
)
from rlhf_core.models.fast_adapters import LowRankUpdate, tensor_version, update_in_place, update_of
from rlhf_core.models.patches import holding, holds

MARGINS = {torch.float32: 0.75, torch.bfloat16: 0.95, torch.float16: 0.95}
"""Packed products are used where they need at most this share of the time of PyTorch's. In 16 bits PyTorch calls oneDNN, too,
with the same bits. In float32 it doesn't on x86: a share that noise doesn't cross makes all of a machine's processes agree."""
MEMORY_SHARE = 0.25
"""Weights are packed where their copy takes at most this share of the memory that is available."""
WIDE_MARGIN = 0.5
"""Products of 16-bit numbers run in float32 where that takes at most this share of the time of any other way: about a fifth on
processors without instructions for these, more than the whole on others."""
LEAST_ROWS = 4
"""For fewer tokens, bringing a weight that isn't packed into float32 takes longer than a product in 16 bits."""
PART = 1 << 20
"""Of a weight that isn't packed, so many numbers are in float32 at a time: few enough to stay in the processor's caches, and in
memory that is used again."""
ROWS = 64
"""Tokens in a product for which weights are packed; any number may come."""


class FastLinears:
    """A network's linear layers, that run faster inside `running`.

    Layers of other classes and devices run as ever, and so do calls with gradients, in another thread, or in another dtype than
    the one packed for.

    Args:
        network: whose layers; it is never changed outside of `running`.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._products: dict[nn.Module, _Product] = {}
        """Packed layers → the product that each has part in."""
        self._groups: list[tuple[torch.dtype, list[Any]]] = []
        """Layers that were called once, in that order, those together that were given the same input, with their dtype."""
        self._last: Tensor | None = None
        """The input of the last group."""
        self._bases: set[nn.Module] = set()
        """Layers that run within LoRA layers."""
        self._pack = False
        self._left = 0
        """Bytes that further packed weights may take."""

    @contextlib.contextmanager
    def running(self, *, pack: bool) -> Iterator[None]:
        """Run the layers fast inside the context; LoRA layers whose updates are fused around it, too.

        Args:
            pack: whether so many passes follow that it pays to pack weights, which takes as long as a few passes. Weights that
                are packed already are used in either case.
        """
        modules: list[Any] = list(self._network.modules())
        updates = {module: update for module in modules if (update := _packable_update(module)) is not None}
        before = self._bases, self._pack, self._groups, self._last  # of a context around this one
        self._bases, self._groups, self._last = {update.base for update in updates.values()}, [], None
        if any(product.is_stale() for product in set(self._products.values())):
            self.release()
        self._pack = pack
        if pack and not self._products:
            self._left = int(MEMORY_SHARE * available_bytes())
        plain = {module: vars(module).get("forward") for module in modules if _is_plain(module)}
        for layer in (*plain, *updates):
            layer.forward = functools.partial(self._forward, layer)
        try:
            with holding(self):
                yield
        finally:
            for layer, own in plain.items():
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own
            for layer, update in updates.items():
                layer.forward = update.forward
            self._bases, self._pack, self._groups, self._last = before
            for product in self._products.values():
                product.forget()

    def release(self) -> None:
        """Free packed weights."""
        self._products.clear()

    def _forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        ordinary = torch.is_grad_enabled() or not holds(self) or not x.numel() or args or kwargs
        way = None if ordinary else _way(dtype, torch.get_num_threads())
        if way is None:
            return _plain(layer, x, *args, **kwargs)
        product = self._products.get(layer)
        if product is not None and product.dtype == dtype:
            update = update_of(layer)
            return product.of(layer, x) if update is None or update.is_current() else _plain(layer, x)
        if self._pack and layer not in self._bases:
            self._note(layer, x, dtype)
        if type(layer) is nn.Linear and way == torch.float32:
            if dtype != way and x.numel() >= LEAST_ROWS * x.shape[-1]:
                return _widened(layer, x, dtype)
            if dtype == way == layer.weight.dtype:
                return onednn_linear(x, layer.weight, layer.bias)
        return _plain(layer, x)

    def _note(self, layer: Any, x: Tensor, dtype: torch.dtype) -> None:
        """Note a layer's first call; with the first second call, those noted have had a pass, and their weights are packed."""
        if any(layer in group for _, group in self._groups):
            groups, self._groups, self._last = self._groups, [], None
            for of_dtype, group in groups:
                self._pack_group(group, of_dtype)
        elif x is self._last and self._groups[-1][0] == dtype:
            self._groups[-1][1].append(layer)
        else:
            self._groups.append((dtype, [layer]))
            self._last = x

    def _pack_group(self, group: list[Any], dtype: torch.dtype) -> None:
        size = sum(_base(layer).weight.numel() for layer in group) * product_dtype(dtype).itemsize
        if size <= self._left:
            self._left -= size
            self._products.update(dict.fromkeys(group, _Product(group, dtype, self._split)))
        else:
            self._pack = False

    def _split(self, product: _Product) -> None:
        """Let the layers of a product, which don't read the same input after all, have one each."""
        for layer in product.layers:
            self._products[layer] = _Product([layer], product.dtype, self._split)


class _Product:
    """One product for all layers that read the same input.

    Args:
        layers: in the order in which they are called.
        split: called where one of them is given another input.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype, split: Callable[[_Product], None]) -> None:
        self.layers, self.dtype, self._split = list(layers), dtype, split
        self._bases = [_base(layer) for layer in layers]
        self._wide = product_dtype(dtype)
        self._made_from = self._versions()
        matrices = [_matrix(base).detach().to(dtype).to(self._wide) for base in self._bases]
        self._widths = [len(one) for one in matrices]
        self._bias = self._biases()
        self._weight = _reordered(torch.cat(matrices))
        self._down, self._up = self._adapters()
        self._input: Tensor | None = None
        self._version = 0.0
        self._outputs: dict[nn.Module, Tensor] = {}

    def _biases(self) -> Tensor | None:
        biases: list[Any] = [base.bias for base in self._bases]
        if all(one is None for one in biases):
            return None
        whole = [torch.zeros(n) if b is None else b.detach() for n, b in zip(self._widths, biases, strict=True)]
        return torch.cat([one.to(self.dtype).to(self._wide) for one in whole])

    def _adapters(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the adapters' first matrices, packed, and their second ones, scaled, as the blocks of one (K, O)."""
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        for layer, width in zip(self.layers, self._widths, strict=True):
            update = update_of(layer)
            own = [] if update is None else [(up * scale).t() for up, scale in update.scaled]
            downs += [] if update is None else update.downs
            ups.append(torch.cat(own) if own else torch.zeros(0, width))
        if not downs:
            return None, None
        down, up = (one.to(self.dtype).to(self._wide) for one in (torch.cat(downs), torch.block_diag(*ups)))
        return _reordered(down), up

    def of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return a layer's output (…, O) for an input (…, I)."""
        if len(self.layers) == 1:
            return self._compute(x)
        version = tensor_version(x)
        if x is self._input and version == self._version and layer in self._outputs:
            return self._outputs.pop(layer)
        if self._outputs:
            self._outputs.clear()
            self._split(self)
        found = self._compute(x)
        self._input, self._version = x, version
        self._outputs = dict(zip(self.layers, found.split(self._widths, dim=-1), strict=True))
        return self._outputs.pop(layer)

    def _compute(self, x: Tensor) -> Tensor:
        """Return (…, O) all layers' outputs, side by side."""
        x = x.to(self.dtype).to(self._wide)
        found = onednn_linear(x, self._weight, self._bias)
        if self._down is not None and self._up is not None:
            found.view(-1, found.shape[-1]).addmm_(onednn_linear(x, self._down).view(-1, len(self._up)), self._up)
        return found.to(self.dtype)

    def forget(self) -> None:
        """Release the last input and outputs."""
        self._input = None
        self._outputs.clear()

    def is_stale(self) -> bool:
        """Tell whether a layer's weights are others than those packed."""
        return self._made_from != self._versions()

    def _versions(self) -> list[Any]:
        found: list[Any] = []
        for layer, base in zip(self.layers, self._bases, strict=True):
            update = update_of(layer)
            found += [type(base), _state(base.weight), _state(base.bias)]
            if update is not None:
                # These tensors are made for each call, of parameters that stay.
                found += [(_state(up)[1:], scale) for up, scale in update.scaled]
                found += [_state(down)[1:] for down in update.downs]
        return found


def packed(weight: Tensor) -> Tensor:
    """Return a weight (O, I) as `product` reads it fastest: packed where that is faster, else as it is."""
    way = _way(weight.dtype, torch.get_num_threads()) if weight.device.type == "cpu" else None
    return weight if way is None else _reordered(weight.to(way))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weightᵀ (…, O) in x's dtype, for x (…, I) of the dtype of the weight that `packed` was given."""
    return onednn_linear(x.to(weight.dtype), weight).to(x.dtype) if weight.is_mkldnn else F.linear(x, weight)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of a dtype's numbers run on a CPU: itself, or float32 where that is much faster."""
    return _way(dtype, torch.get_num_threads()) or dtype


def _is_plain(module: Any) -> bool:
    """Tell whether a module is a linear layer with nothing special about it."""
    if type(module) not in (nn.Linear, Conv1D) or not (own_forward(module) is None or has_fast_products(module)):
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.is_floating_point() and weight.is_contiguous() and weight.numel() > 0


def _packable_update(module: Any) -> LowRankUpdate | None:
    """Return a LoRA layer's fused update where its base does nothing but a plain layer's work; None for any other module."""
    update = update_in_place(module)
    if update is None or type(update.base) is not nn.Linear or not _is_plain(update.base):
        return None
    # The base itself isn't called where its weight is packed.
    return None if update.base._forward_hooks or update.base._forward_pre_hooks else update


def _base(layer: Any) -> Any:
    """Return the layer with the weight: itself, or the base of a LoRA layer."""
    return layer if type(layer) in (nn.Linear, Conv1D) else layer.base_layer


def _matrix(base: Any) -> Tensor:
    """Return a layer's weight as (O, I)."""
    weight: Tensor = base.weight
    return weight.t() if type(base) is Conv1D else weight


def _widened(layer: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a layer's output for products of a 16-bit dtype that run in float32, with a weight that isn't packed."""
    x = x.to(dtype).float()
    parts = layer.weight.split(max(1, PART // layer.in_features))
    biases = [None] * len(parts) if layer.bias is None else layer.bias.to(dtype).float().split([*map(len, parts)])
    found = [onednn_linear(x, part.to(dtype).float(), bias).to(dtype) for part, bias in zip(parts, biases, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _plain(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    update = update_of(layer)
    found: Tensor = forward(layer, x, *args, **kwargs) if update is None else update.forward(x, *args, **kwargs)
    return found


def _state(tensor: Tensor | None) -> Any:
    """Return what differs once a tensor was replaced or changed in place."""
    return None if tensor is None else (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


def _reordered(weight: Tensor) -> Tensor:
    """Return a weight (O, I) in the order in which oneDNN reads it."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    return found


@functools.cache
def _way(dtype: torch.dtype, threads: int) -> torch.dtype | None:
    """Return the dtype in which packed products of a decoding step run on this machine; None where PyTorch's are taken.

    Args:
        threads: that PyTorch uses; the answer is kept for each number of them.
    """
    if dtype not in MARGINS:
        return None
    choice = f"{str(dtype).removeprefix('torch.')} products in generation"
    ways = {"oneDNN": dtype} | ({"oneDNN in float32": torch.float32} if dtype != torch.float32 else {})
    usable = {name: way for name, way in ways.items() if _is_right(dtype, way)}
    if not usable:
        note_choice(choice, "PyTorch", reason="oneDNN lacks these products, or they are wrong", threads=threads)
        return None
    recorded = follow_record(choice, threads=threads)
    if recorded == "PyTorch" or recorded in usable:
        return usable.get(recorded)
    works = {name: functools.partial(_packed_product(dtype, way), _example(dtype)[0]) for name, way in usable.items()}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        theirs, *ours = least_seconds(lambda: F.linear(*_example(dtype)), *works.values())
    seconds = dict(zip(works, ours, strict=True))
    taken, best = "PyTorch", theirs
    if seconds.get("oneDNN", math.inf) < MARGINS[dtype] * theirs:
        taken, best = "oneDNN", seconds["oneDNN"]
    if seconds.get("oneDNN in float32", math.inf) < WIDE_MARGIN * best:
        taken, best = "oneDNN in float32", seconds["oneDNN in float32"]
    shares = {f"share_of_time_{name.replace(' ', '_')}": round(one / theirs, 3) for name, one in seconds.items()}
    note_choice(choice, taken, **shares, taken_up_to=MARGINS[dtype], threads=threads)
    return usable.get(taken)


@functools.cache
def _example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a decoding step's x (N, I) and weight (O, I)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 768, generator=generator).to(dtype) for rows in (ROWS, 1536))
    return x, weight


def _packed_product(dtype: torch.dtype, way: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the example's product with packed weights, in a dtype."""
    weight = _reordered(_example(dtype)[1].to(way))
    return lambda x: onednn_linear(x.to(way), weight).to(dtype)


def _is_right(dtype: torch.dtype, way: torch.dtype) -> bool:
    """Tell whether this build of PyTorch has packed products in a dtype, for this processor, and what they give is right."""
    x, weight = _example(dtype)
    expected = x.double() @ weight.double().T
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = _packed_product(dtype, way)(x).double()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return float((found - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


def measure_products() -> None:
    """Measure now which products are faster on this machine's CPU, in training and in generation."""
    threads = torch.get_num_threads()
    is_faster(threads)
    for dtype in MARGINS:
        _way(dtype, threads)
