"""Devices, logging, files and random streams: what every layer above stands on."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"DeviceManager": "devices", "setup_logging": "log", "RandomState": "seeds", "stream_seed": "seeds"}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"rlhf_core.infra.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'rlhf_core.infra' has no attribute {name!r}")
