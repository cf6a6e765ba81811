"""Heads that map hidden states to scores, always in float32: scores are compared by small differences."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoLayerHead(nn.Module):
    """Scores from hidden states: W₂ silu(W₁ h + b₁) + b₂.

    Args:
        width: D, of the hidden states.
        outputs: scores a position.
        seed: of the initial weights, which depend on nothing else.
    """

    def __init__(self, width: int, outputs: int = 1, *, seed: int = 0) -> None:
        super().__init__()
        self.width = width
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, outputs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(self.inner.weight, std=width**-0.5)
            nn.init.normal_(self.outer.weight, std=width**-0.5)
            nn.init.zeros_(self.inner.bias)
            nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (S, D) to (S, outputs) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(nn.functional.silu(self.inner(hidden.float())))


class LinearHead(nn.Module):
    """One layer without bias, as in transformers' sequence classifiers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.outer = nn.Linear(width, 1, bias=False)

    @classmethod
    def like(cls, layer: nn.Linear) -> LinearHead:
        """Return a head with a layer's weights."""
        head = cls(layer.in_features)
        with torch.no_grad():
            head.outer.weight.copy_(layer.weight)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (S, D) to (S, 1) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(hidden.float())
