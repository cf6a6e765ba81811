"""Infrastructure: devices, logging, errors, files, random streams. Imports nothing above itself."""

from __future__ import annotations

from rlhf_core.infra.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.infra.devices": "DeviceManager",
        "rlhf_core.infra.seeds": "RandomState stream_seed",
    },
)
