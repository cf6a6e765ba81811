"""From hidden states to logits as the model itself computes them, found by measuring.

Models multiply, divide and cap their logits, put a layer before the output embedding, or do something new, and each configuration
has its own name for it. So a model is fed hidden states of three sizes, and its logits are compared with the product x of
these and its output embedding: they are slope · x, or cap · tanh(slope · x / cap), or else the model's own code computes them.

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
from rlhf_core.models.probe import FAILURES, Findings, tolerance

SIZES = (0.01, 30.0, 1e4)
"""Standard deviations of the logits that are tried: below any cap, near one, and far beyond."""

_MASKED = -1e9
"""Logits at or below this are no logits: a model leaves these tokens out."""


@dataclass(frozen=True)
class OutputLayer:
    """What a model does with the product x of hidden states and output embedding: cap · tanh(slope · x / cap)."""

    slope: float = 1.0
    cap: float | None = None
    """None where nothing is capped: logits are slope · x."""
    own: bool = False
    """Whether logits are no such function of x, and the model's own code computes them from hidden states."""

    def apply(self, product: Tensor) -> Tensor:
        """Return the logits for x (S, V)."""
        product = product * self.slope if self.slope != 1.0 else product
        return product if self.cap is None else self.cap * torch.tanh(product / self.cap)


class Unexplained(Exception):
    """Hidden states alone don't decide the model's logits."""


@torch.no_grad()
def measure(network: Any, findings: Findings) -> OutputLayer:
    """Return what a model does between its backbone and its logits.

    Raises:
        Unexplained: hidden states alone don't decide the logits.
    """
    ids = plain_ids(network, 12)
    with evaluating(network), exact_products(network):
        head = network.get_output_embeddings()
        crafted = _crafted(torch.empty(len(ids), findings.width, dtype=findings.dtype, device=ids.device), head)
        own = _own_logits_within(network, findings.backbone, ids, crafted)
        if head is not None:
            try:
                product = head(crafted).float()
            except FAILURES:
                product = None
            # Where the product is the same for all, such as 0, nothing can be measured.
            if product is not None and product.shape == own.shape and float(product.std()) > 0:
                for layer in _candidates(product, own, network.config, findings.dtype):
                    if _same(layer.apply(product), own, findings.dtype):
                        return layer
        logits = graft(network, findings)
        # As they will be read: chosen positions in any order, each on its own.
        for rows in (torch.arange(len(ids)), torch.arange(len(ids) - 1, -1, -1), torch.arange(1, len(ids), 2)):
            if not _same(logits(crafted[rows]), own[rows], findings.dtype):
                raise Unexplained
    return OutputLayer(own=True)


def graft(network: Any, findings: Findings) -> Callable[[Tensor], Tensor]:
    """Return a function from hidden states (S, D) to logits (S, V): the model's own code above its backbone."""

    def logits(hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with replaced_hidden(findings.backbone, hidden[None], findings.output_type):
            return network(input_ids=ids).logits[0]

    return logits


def _crafted(hidden: Tensor, head: nn.Module | None) -> Tensor:
    """Return random hidden states like `hidden` (S, D) that give logits of each of `SIZES`, as far as the output layer tells."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    scale = 1.0
    if head is not None:
        try:
            spread = float(head((made / made.std()).to(hidden.dtype)).float().std())
            scale = 1.0 / spread if spread > 0 and math.isfinite(spread) else 1.0
        except FAILURES:
            pass
    sizes = torch.tensor(SIZES, device=hidden.device).repeat_interleave(-(-len(made) // len(SIZES)))[: len(made)]
    return (made * scale * sizes[:, None]).to(hidden.dtype)


def _own_logits_within(network: Any, backbone: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return (S, V) logits of a whole forward pass in which the backbone has run, and returned other hidden states."""

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
    """Yield what the logits may be, measured at the small and the large end."""
    yield OutputLayer()
    third = len(product) // len(SIZES)
    small, large = product[:third], own[-third:]
    constants = sorted(_constants(config.get_text_config().to_dict()))
    slope = _snapped(float((own[:third] * small).sum() / small.square().sum()), constants, dtype)
    if slope is None:
        return
    yield OutputLayer(slope)
    cap = _snapped(float(large.abs().max()), constants, dtype)
    if cap is not None:
        yield OutputLayer(slope, cap)


def _constants(values: Any) -> set[float]:
    """Return every number in a configuration with its inverse, whatever it is called."""
    found = {1.0}
    for value in values.values() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            found |= _constants(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value):
            found |= {float(value), 1.0 / value}
    return found


def _snapped(measured: float, constants: list[float], dtype: torch.dtype) -> float | None:
    """Return the constant that a measured number means, else the number itself; None where it is no number or too rough."""
    if not (math.isfinite(measured) and measured > 0):
        return None
    near = min(constants, key=lambda constant: abs(math.log(constant / measured)))
    if abs(near / measured - 1) < (1e-5 if dtype == torch.float32 else 1e-2):
        return near
    return measured if dtype == torch.float32 else None


def _same(found: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether logits (S, V) agree, row by row, and leave out the same tokens."""
    found, own = found.double(), own.double()
    masked = ~(own > _MASKED)
    if not torch.equal(~(found > _MASKED), masked) or bool(masked.all()):
        return False
    found, own = found.masked_fill(masked, 0.0), own.masked_fill(masked, 0.0)
    error = (found - own).norm(dim=1) / own.norm(dim=1).clamp(min=1e-30)
    return bool((error < tolerance(dtype) / 10).all())
