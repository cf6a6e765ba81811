"""Devices, logging, files and random streams: what every layer above stands on."""

from __future__ import annotations

from rlhf_core.infra.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.infra.devices": "DeviceManager",
        "rlhf_core.infra.seeds": "RandomState stream_seed",
    },
)
