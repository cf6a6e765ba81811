"""Linear layers on a CPU for the many small forward passes of generation: through oneDNN, over weights in the order it reads.

Weights are packed once, where oneDNN would bring them into its own order in each product. Layers that read the same input, such
as q, k and v, are one product, and their input is cast once. For float32, PyTorch on x86 calls MKL, which needs twice oneDNN's
time on processors of another maker. Whether packed products are faster at all is measured.

Packed weights are a copy, made from the layers' own when tokens are drawn, and thrown away as soon as those change.

Axes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

MARGIN = 0.95
"""Packed products are used where they need at most this share of the time of PyTorch's."""
MEMORY_SHARE = 0.25
"""Weights are packed where their copy takes at most this share of the memory that is available."""
ROWS = 64
"""Tokens in a product for which weights are packed; any number may come."""


class FastLinears:
    """A network's linear layers, that run faster inside `running`.

    Layers of other classes and devices, and calls with gradients or in another dtype than the one packed for, run as ever.

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
        self._pack = False
        self._left = 0
        """Bytes that further packed weights may take."""

    @contextlib.contextmanager
    def running(self, *, pack: bool) -> Iterator[None]:
        """Run the layers fast inside the context.

        Args:
            pack: whether so many passes follow that it pays to pack weights, which takes as long as a few passes. Weights that
                are packed already are used in either case.
        """
        layers: list[Any] = [module for module in self._network.modules() if _is_plain(module)]
        if any(product.is_stale() for product in set(self._products.values())):
            self.release()
        self._pack = pack
        if pack and not self._products:
            self._left = int(MEMORY_SHARE * psutil.virtual_memory().available)
        for layer in layers:
            layer.forward = functools.partial(self._forward, layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward
            self._groups, self._last = [], None
            for product in self._products.values():
                product.forget()

    def release(self) -> None:
        """Free packed weights."""
        self._products.clear()

    def _forward(self, layer: Any, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if torch.is_grad_enabled() or not x.numel() or not _is_faster(dtype, torch.get_num_threads()):
            return _plain(layer, x)
        product = self._products.get(layer)
        if product is not None and product.dtype == dtype:
            return product.of(layer, x)
        if self._pack:
            self._note(layer, x, dtype)
        if dtype == torch.float32 and type(layer) is nn.Linear and layer.weight.dtype == dtype:
            return _onednn(x, layer.weight, layer.bias)
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
        size = sum(layer.weight.numel() for layer in group) * dtype.itemsize
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
        matrices = [_matrix(layer).detach().to(dtype) for layer in layers]
        biases: list[Any] = [layer.bias for layer in layers]
        bias = None
        if any(one is not None for one in biases):
            bias = torch.cat([
                one.new_zeros(len(one)) if b is None else b.detach() for one, b in zip(matrices, biases, strict=True)
            ]).to(dtype)  # fmt: skip
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(matrices).contiguous(), ROWS)
        self._widths = [len(one) for one in matrices]
        self._made_from = self._versions()
        self._input: Tensor | None = None
        self._version = 0
        self._outputs: dict[nn.Module, Tensor] = {}

    def of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return a layer's output (…, O) for an input (…, I)."""
        if len(self.layers) == 1:
            return _onednn(x.to(self.dtype), self._weight, self._bias)
        if x is self._input and self._version == x._version and layer in self._outputs:
            return self._outputs.pop(layer)
        if self._outputs:
            self._outputs.clear()
            self._split(self)
        found = _onednn(x.to(self.dtype), self._weight, self._bias)
        self._input, self._version = x, x._version
        self._outputs = dict(zip(self.layers, found.split(self._widths, dim=-1), strict=True))
        return self._outputs.pop(layer)

    def forget(self) -> None:
        """Release the last input and outputs."""
        self._input = None
        self._outputs.clear()

    def is_stale(self) -> bool:
        """Tell whether a layer's weights are others than those packed."""
        return self._made_from != self._versions()

    def _versions(self) -> list[Any]:
        tensors: list[Any] = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias)]
        return [
            None if t is None else (id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors
        ]  # fmt: skip


def packed(weight: Tensor) -> Tensor:
    """Return a weight (O, I) as `product` reads it fastest: packed where that is faster, else as it is."""
    if weight.device.type != "cpu" or not _is_faster(weight.dtype, torch.get_num_threads()):
        return weight
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return found


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weightᵀ (…, O) for x (…, I) of the weight's dtype and a weight from `packed`."""
    return _onednn(x, weight) if weight.is_mkldnn else F.linear(x, weight)


def _is_plain(module: Any) -> bool:
    """Tell whether a module is a linear layer with nothing special about it."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.is_floating_point() and weight.is_contiguous() and weight.numel() > 0


def _matrix(layer: Any) -> Tensor:
    """Return a layer's weight as (O, I)."""
    weight: Tensor = layer.weight
    return weight.t() if type(layer) is Conv1D else weight


def _plain(layer: Any, x: Tensor) -> Tensor:
    found: Tensor = type(layer).forward(layer, x)
    return found


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x · weightᵀ + bias, (…, O) for x (…, I) and weight (O, I), packed or not, by oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@functools.cache
def _is_faster(dtype: torch.dtype, threads: int) -> bool:
    """Tell whether packed products of a decoding step are faster on this machine, and right.

    Args:
        threads: that PyTorch uses; the answer is kept for each number of them.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 768, generator=generator).to(dtype) for rows in (ROWS, 1536))
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            expected = x.double() @ weight.double().T
            difference = float((_onednn(x, reordered).double() - expected).norm() / expected.norm())
            return difference < (1e-5 if dtype == torch.float32 else 1e-2) and _seconds(
                lambda: _onednn(x, reordered)
            ) < MARGIN * _seconds(lambda: F.linear(x, weight))
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
