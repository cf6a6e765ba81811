"""Heads that map hidden states to scores, always in float32: scores are compared by small differences.

Axes: S hidden states, D their width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn


class TwoLayerHead(nn.Module):
    """Scores from hidden states: W₂ silu(W₁ h + b₁) + b₂.

    Args:
        width: D.
        outputs: scores per hidden state.
        seed: of the initial weights, which depend on nothing else.
        zero: whether the last layer, and with it every score, begins at 0.
    """

    def __init__(self, width: int, outputs: int = 1, *, seed: int = 0, zero: bool = False) -> None:
        super().__init__()
        self.width = width
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, outputs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(self.inner.weight, std=width**-0.5)
            nn.init.normal_(self.outer.weight, std=width**-0.5)
            nn.init.zeros_(self.inner.bias)
            nn.init.zeros_(self.outer.bias)
            if zero:
                nn.init.zeros_(self.outer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (S, D) to (S, outputs) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(nn.functional.silu(self.inner(hidden.float())))


class LinearHead(nn.Module):
    """One linear layer, as in transformers' sequence classifiers, most of which have no bias."""

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        self.outer = nn.Linear(width, 1, bias=bias)  # the name in saved files, as in `TwoLayerHead`

    @classmethod
    def like(cls, layer: nn.Linear) -> LinearHead:
        """Return a head with a copy of a layer's weights."""
        head = cls(layer.in_features, bias=layer.bias is not None)
        head.outer.load_state_dict(layer.state_dict())
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (S, D) to (S, 1) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(hidden.float())


SCALAR_HEADS: dict[str, Callable[[int], nn.Module]] = {
    "two_layer": TwoLayerHead,
    "linear": LinearHead,
    "linear_bias": functools.partial(LinearHead, bias=True),
}
"""Name in a head's file → a function from the width D to a head of one score."""


def scalar_head_name(head: nn.Module) -> str:
    """Return the name of a head of one score in `SCALAR_HEADS`."""
    if not isinstance(head, LinearHead):
        return "two_layer"
    return "linear" if head.outer.bias is None else "linear_bias"
