"""Whether a policy's weights are those that keys and values were computed with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SAMPLES = 64
"""Numbers of each tensor that are compared."""


def weight_versions(model: nn.Module) -> Any:
    """Return what differs once a weight was replaced or changed in place, or an adapter switched on or off.

    It misses changes behind PyTorch's back (`.data`).
    """
    versions = [
        (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and tensor.device.type != "meta"
    ]
    return versions, _adapters(model)


@torch.no_grad()
def weights_state(model: nn.Module) -> Any:
    """Return what differs once a weight has changed, or another adapter is on, and compares equal while nothing has.

    Changes in place count up a tensor's version. Those behind PyTorch's back (`.data`) don't: they show where they change one of
    `SAMPLES` numbers that are spread over a tensor, as a step of an optimiser does.
    """
    tensors = [*model.parameters(), *model.buffers()]
    some = [
        tensor.flatten()[:: max(1, tensor.numel() // SAMPLES)][:SAMPLES].double().sum()
        for tensor in tensors
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type not in ("meta", "mps")
    ]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for number in some:
        by_device.setdefault(number.device, []).append(number)
    # As bits: a sum that isn't a number equals itself, too.
    sums = [torch.stack(numbers).view(torch.int64).tolist() for numbers in by_device.values()]
    return weight_versions(model), sums


def _adapters(model: nn.Module) -> list[Any]:
    """Return which adapters each layer adds to its output, and by which factor."""
    layers: Iterator[Any] = model.modules()
    return [
        (layer.disable_adapters, list(layer.active_adapters), list(layer.merged_adapters), dict(layer.scaling))
        for layer in layers
        if "scaling" in layer.__dict__ and hasattr(layer, "disable_adapters")
    ]
