"""Root-mean-square norms on a GPU: PyTorch's one kernel in place of the six operations that models write them with.

A step of a small model is bound by how many operations the host launches, and norms as transformers' models spell them out are a
third of those. The kernel also keeps less for the backward pass. Which modules are such norms is found by trying: each is
compared with its own code, on the first values that it meets on a GPU, and one that differs keeps its own. On a CPU nothing
changes.
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
"""Dtype → how far results may differ, relative: by roundings, of which the kernel does fewer."""
_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def fuse_norms(network: nn.Module) -> int:
    """Let the network's norms take the kernel on a GPU, in place; return how many may."""
    norms = [module for module in network.modules() if _may_be_norm(module)]
    for module in norms:
        module.forward = types.MethodType(forward, module)
        module._fused = {}  # type: ignore[assignment]
    return len(norms)


def _may_be_norm(module: nn.Module) -> bool:
    """Tell whether a module has the looks of a norm: one vector of weights and a small number. Trying it decides."""
    if isinstance(module, nn.RMSNorm) or "rmsnorm" not in type(module).__name__.lower():
        return False
    if "forward" in vars(module):  # somebody's stands in already, maybe this one
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
    found = [value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if len(found) == 1 else None


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a norm's `forward`; bound to the module, so that a copy of the module is bound to the copy.

    Its name is the method's, so that a pickled module is found to have the method of its class.
    """
    own = type(self).forward
    if len(args) != 1 or kwargs or not _applies(args[0]):
        return own(self, *args, **kwargs)
    x: Tensor = args[0]
    weight: Tensor = self.weight  # type: ignore[assignment]
    if x.dtype != weight.dtype or x.shape[-1:] != weight.shape:
        return own(self, x)
    fused: dict[torch.dtype, bool] = self._fused  # type: ignore[assignment]
    if x.dtype not in fused:
        agrees = _agrees(self, x)
        if agrees is None:
            return own(self, x)
        fused[x.dtype] = agrees
    return _kernel(x, weight, _epsilon(self)) if fused[x.dtype] else own(self, x)


def _applies(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cuda and x.numel() > 0


def _kernel(x: Tensor, weight: Tensor, epsilon: float | None) -> Tensor:
    # Autocast may widen it; what stands there computes in float32 inside and gives what it was given.
    return F.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)


@torch.no_grad()
def _agrees(module: nn.Module, x: Tensor) -> bool | None:
    """Tell whether the kernel gives what a norm's own code does; None where these values don't show it."""
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
