"""Whether a policy's weights are those that keys and values were computed with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SAMPLES = 8
"""Numbers of each tensor that are compared."""


@torch.no_grad()
def weights_state(model: nn.Module) -> Any:
    """Return what differs once a weight has changed, and compares equal while none has.

    Changes in place count up a tensor's version; those behind PyTorch's back (`.data`) mostly show in some of its numbers.
    """
    tensors = [*model.parameters(), *model.buffers()]
    known = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors if tensor.device.type != "meta"]
    some = [
        tensor.flatten()[:: max(1, tensor.numel() // SAMPLES)][:SAMPLES].double().sum()
        for tensor in tensors
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type not in ("meta", "mps")
    ]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for number in some:
        by_device.setdefault(number.device, []).append(number)
    return known, [torch.stack(numbers).tolist() for numbers in by_device.values()]
