"""Root-mean-square norms on a GPU: PyTorch's one kernel in place of the six operations that models write them with.

The speed of a small model is bound by how many operations the host launches, and norms as transformers' models write them are a
third of those. The kernel also keeps less for the backward pass. Which modules are such norms is found by trying: each is
compared with its own code on the first values that it meets, per dtype, and one that differs keeps its own code.
"""

from __future__ import annotations

import logging
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Dtype → most relative difference between the kernel's results and the module's: the kernel rounds less often."""
_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def fuse_norms(network: nn.Module, *, devices: tuple[str, ...] = ("cuda",)) -> int:
    """Let the network's norms use PyTorch's kernel on some types of device, in place; elsewhere nothing changes.

    Returns:
        How many modules may use it; each is compared with its own code before it does.
    """
    norms = [module for module in network.modules() if _may_be_norm(module)]
    for module in norms:
        module.forward = types.MethodType(forward, module)
        module._fused_on = devices  # type: ignore[assignment]
        module._agrees = {}  # type: ignore[assignment]
    return len(norms)


def _may_be_norm(module: nn.Module) -> bool:
    """Tell whether a module looks like a norm: named so, one vector of weights, one small number. A comparison decides later."""
    if isinstance(module, nn.RMSNorm) or "rmsnorm" not in type(module).__name__.lower():
        return False
    if "forward" in vars(module):  # replaced already, maybe by this function
        return False
    parameters = dict(module.named_parameters())
    return (
        parameters.keys() == {"weight"}
        and parameters["weight"].ndim == 1
        and not any(True for _ in module.children())
        and not any(True for _ in module.buffers())
        and _epsilon(module) is not None
    )


def _epsilon(module: nn.Module) -> float | None:
    """Return the number that a norm adds to the mean square, where exactly one attribute can be it."""
    found = [value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if len(found) == 1 else None


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return a norm's output, by the fused kernel where it fits the input and agrees with the norm's own `forward`, else by that.

    Agreement is measured once for each dtype; where the first input can't show it, the next one is tried. The function is set
    on a module as a bound method named `forward`, so that a copy has a method bound to the copy, and a pickled module finds its
    class's.
    """
    own = type(self).forward
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return own(self, *args, **kwargs)
    x: Tensor = args[0]
    weight: Tensor = self.weight  # type: ignore[assignment]
    on_device = x.device.type in self._fused_on  # type: ignore[operator]
    if not on_device or not x.numel() or x.dtype != weight.dtype or x.shape[-1:] != weight.shape:
        return own(self, x)
    agrees: dict[torch.dtype, bool] = self._agrees  # type: ignore[assignment]
    if x.dtype not in agrees:
        found = _compare(self, x)
        if found is None:
            return own(self, x)
        agrees[x.dtype] = found
    return _kernel(x, weight, _epsilon(self)) if agrees[x.dtype] else own(self, x)


def _kernel(x: Tensor, weight: Tensor, epsilon: float | None) -> Tensor:
    """Return x / sqrt(mean(x²) + epsilon) · weight over the last axis, in x's dtype, which autocast may have widened."""
    return F.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)


@torch.no_grad()
def _compare(module: nn.Module, x: Tensor) -> bool | None:
    """Tell whether the kernel gives what a norm's own code does; None where all of x is 0, which would show nothing."""
    if not bool(x.any()):
        return None
    own = type(module).forward(module, x)
    found = _kernel(x, module.weight, _epsilon(module))  # type: ignore[arg-type]
    if (
        not isinstance(own, Tensor)
        or (own.shape, own.dtype) != (found.shape, found.dtype)
        or x.dtype not in MAX_DIFFERENCE
    ):
        return False
    difference = float((found.float() - own.float()).norm() / own.float().norm().clamp(min=1e-30))
    agrees = difference < MAX_DIFFERENCE[x.dtype]
    if not agrees:
        log.debug("%s keeps its own code: the kernel's results differ by %.1e", type(module).__name__, difference)
    return agrees
