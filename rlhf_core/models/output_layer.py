"""From hidden states to logits as the model itself computes them, found by measuring.

Models multiply, divide and cap their logits, put a layer before the output embedding, or do something new, and each
configuration has another name for it. So hidden states of three sizes are put into a model, and its logits are compared with
x, the product of these states and its output embedding: logits are slope · x, or cap · tanh(slope · x / cap), or else the model's
own code computes them.

Axes: S hidden states, D their width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.models.backbone import plain_ids, replaced_hidden
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.precision import exact_products
from rlhf_core.models.probe import FAILURES, ProbeResult, tolerance

SIZES = (0.01, 30.0, 1e4)
"""Standard deviations of the logits that are tried: below any cap, near one, and far beyond."""

_MASKED = -1e9
"""Logits at or below this mark tokens that the model never generates."""


@dataclass(frozen=True)
class OutputLayer:
    """What a model does with x, the product of hidden states and output embedding: cap · tanh(slope · x / cap)."""

    slope: float = 1.0
    cap: float | None = None
    """None where nothing is capped: logits are slope · x."""
    own_code: bool = False
    """Whether logits are no such function of x, so that the model's own code must compute them from hidden states."""

    def apply(self, product: Tensor) -> Tensor:
        """Return the logits for x (S, V)."""
        product = product * self.slope if self.slope != 1.0 else product
        return product if self.cap is None else self.cap * torch.tanh(product / self.cap)


class LogitsUndetermined(Exception):
    """A model's logits depend on more than its hidden states."""


@torch.no_grad()
def measure_output_layer(network: Any, probed: ProbeResult) -> OutputLayer:
    """Return what a model computes between its backbone and its logits.

    Args:
        network: a transformers model. probed: what was measured about it.

    Raises:
        LogitsUndetermined: logits depend on more than hidden states.
    """
    ids = plain_ids(network, 12)
    with evaluating(network), exact_products(network):
        head = network.get_output_embeddings()
        hidden = _hidden_of_sizes(torch.empty(len(ids), probed.width, dtype=probed.dtype, device=ids.device), head)
        own = _logits_within(network, probed.backbone, ids, hidden)
        if head is not None:
            try:
                product = head(hidden).float()
            except FAILURES:
                product = None
            # Where the product is the same everywhere, such as 0, nothing can be measured.
            if product is not None and product.shape == own.shape and float(product.std()) > 0:
                for layer in _candidates(product, own, network.config, probed.dtype):
                    if _agree(layer.apply(product), own, probed.dtype):
                        return layer
        logits = own_code_logits(network, probed)
        # As they will be asked for: chosen positions in any order, each by itself.
        for rows in (torch.arange(len(ids)), torch.arange(len(ids) - 1, -1, -1), torch.arange(1, len(ids), 2)):
            if not _agree(logits(hidden[rows]), own[rows], probed.dtype):
                raise LogitsUndetermined
    return OutputLayer(own_code=True)


def own_code_logits(network: Any, probed: ProbeResult) -> Callable[[Tensor], Tensor]:
    """Return a function from hidden states (S, D) to logits (S, V) that runs the model's own code above its backbone."""

    def logits(hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with replaced_hidden(probed.backbone, hidden[None], probed.output_type):
            return network(input_ids=ids).logits[0]

    return logits


def _hidden_of_sizes(like: Tensor, head: nn.Module | None) -> Tensor:
    """Return random hidden states whose logits have standard deviations of `SIZES`, a third each, as far as the head shows.

    Args:
        like: (S, D), for shape, dtype and device.
        head: the output layer, where the model names one.
    """
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(like.shape, generator=generator).to(like.device)
    scale = 1.0
    if head is not None:
        try:
            spread = float(head((made / made.std()).to(like.dtype)).float().std())
            scale = 1.0 / spread if spread > 0 and math.isfinite(spread) else 1.0
        except FAILURES:
            pass
    sizes = torch.tensor(SIZES, device=like.device).repeat_interleave(-(-len(made) // len(SIZES)))[: len(made)]
    return (made * scale * sizes[:, None]).to(like.dtype)


def _logits_within(network: Any, backbone: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return logits (S, V) of a whole forward pass in which the backbone runs, and its result is replaced by `hidden` (S, D)."""

    def swap(module: nn.Module, arguments: Any, output: Any) -> Any:
        if getattr(output, "last_hidden_state", None) is None:
            return (hidden[None], *output[1:])
        output.last_hidden_state = hidden[None]
        return output

    hook = backbone.register_forward_hook(swap)
    try:
        return network(input_ids=ids[None]).logits[0].float()
    finally:
        hook.remove()


def _candidates(product: Tensor, own: Tensor, config: Any, dtype: torch.dtype) -> Iterator[OutputLayer]:
    """Yield output layers that may explain a model's logits: slope and cap measured where logits are smallest and largest.

    Args:
        product: x (S, V), its rows in rising order of size.
        own: the model's logits (S, V).
        config: its configuration, whose numbers a measured value is taken for where it is near one.
        dtype: of the matrix products.
    """
    yield OutputLayer()
    third = len(product) // len(SIZES)
    small, large = product[:third], own[-third:]
    constants = sorted(_constants(config.get_text_config().to_dict()))
    slope = _nearest_constant(float((own[:third] * small).sum() / small.square().sum()), constants, dtype)
    if slope is None:
        return
    yield OutputLayer(slope)
    cap = _nearest_constant(float(large.abs().max()), constants, dtype)
    if cap is not None:
        yield OutputLayer(slope, cap)


def _constants(values: Any) -> set[float]:
    """Return every positive number in a configuration and its inverse, under whatever name."""
    found = {1.0}
    for value in values.values() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            found |= _constants(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value):
            found |= {float(value), 1.0 / value}
    return found


def _nearest_constant(measured: float, constants: list[float], dtype: torch.dtype) -> float | None:
    """Return the constant that equals a measured number up to rounding, else in float32 the number itself, else None."""
    if not (math.isfinite(measured) and measured > 0):
        return None
    near = min(constants, key=lambda constant: abs(math.log(constant / measured)))
    if abs(near / measured - 1) < (1e-5 if dtype == torch.float32 else 1e-2):
        return near
    return measured if dtype == torch.float32 else None


def _agree(found: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether logits (S, V) agree row by row up to rounding, and mask the same tokens."""
    found, own = found.double(), own.double()
    masked = ~(own > _MASKED)
    if not torch.equal(~(found > _MASKED), masked) or bool(masked.all()):
        return False
    found, own = found.masked_fill(masked, 0.0), own.masked_fill(masked, 0.0)
    error = (found - own).norm(dim=1) / own.norm(dim=1).clamp(min=1e-30)
    return bool((error < tolerance(dtype) / 10).all())
