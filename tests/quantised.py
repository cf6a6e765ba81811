"""A model whose linear layers hold their weights in 8 bits, as those of a quantised base do, without a package for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EightBits(nn.Linear):
    """A linear layer whose weight is held in 8 bits, as peft sees those of a quantised base."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().amax() / 127
        quantised = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(quantised, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def quantised(model: nn.Module) -> nn.Module:
    """Return the model, frozen, with every linear layer but the last in 8 bits."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, EightBits(child))
    return model
