"""Rotary encodings whose frequencies depend on the sequence's length: which sequences may share a forward pass.

Two rotary encodings of transformers look at the longest sequence of a batch. `longrope` has one set of frequencies up to the
length that a model was first trained on, and another beyond. `dynamic` (NTK scaling) has other frequencies for every length
beyond, and keeps them until a shorter sequence comes. A response's log-probability must not depend on its neighbours in a batch,
so sequences are forwarded with those of the same frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class LengthClasses:
    """The rotary encodings of a network that depend on length; false where it has none."""

    def __init__(self, network: nn.Module) -> None:
        self._long: list[int] = []
        self._dynamic: list[int] = []
        self._modules: list[Any] = []
        for module in network.modules():
            kind = getattr(module, "rope_type", None)
            kinds = kind if isinstance(kind, Mapping) else {None: kind}
            for layer_type, name in kinds.items():
                if not isinstance(name, str) or not hasattr(module, "config"):
                    continue
                if name == "longrope":
                    self._long.append(_original_length(module, layer_type))
                elif "dynamic" in name:
                    self._dynamic.append(int(module.original_max_seq_len))  # type: ignore[arg-type]
                    self._modules.append(module)

    def __bool__(self) -> bool:
        return bool(self._long or self._dynamic)

    def groups(self, lengths: Tensor) -> list[Tensor]:
        """Return groups of sequences that may share a forward pass, each as indices (r,), for lengths (R,) in tokens."""
        classes: dict[tuple[int, ...], list[int]] = {}
        for index, length in enumerate(lengths.tolist()):
            key = (*(length > limit for limit in self._long), *(length * (length > limit) for limit in self._dynamic))
            classes.setdefault(key, []).append(index)
        return [torch.tensor(members, device=lengths.device) for _, members in sorted(classes.items())]

    def reset(self) -> None:
        """Restore the original frequencies in place: dynamic RoPE would keep those of a long sequence for shorter ones."""
        for module in self._modules:
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                prefix = name.removesuffix("max_seq_len_cached")
                original = getattr(module, f"{prefix}original_inv_freq", None)
                current = getattr(module, f"{prefix}inv_freq", None)
                if original is not None and current is not None and getattr(module, name) > module.original_max_seq_len:
                    module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
                    setattr(module, name, module.original_max_seq_len)


def _original_length(module: Any, layer_type: str | None) -> int:
    """Return the length in tokens up to which a rotary encoding has its original frequencies."""
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    return int(parameters["original_max_position_embeddings"])
