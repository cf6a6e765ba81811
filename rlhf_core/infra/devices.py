"""Choose the device of this process, ask what it supports, and measure and release its memory."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from rlhf_core.infra.errors import ConfigError

Kind = Literal["auto", "cuda", "mps", "cpu"]
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread in each operation: where several are computed at once, or threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DeviceManager:
    """The device of this process.

    Args:
        kind: `auto` chooses an NVIDIA or AMD GPU, else Apple's, else the CPU. Under torchrun each process takes the GPU of its
            local rank. With `ACCELERATE_USE_CPU=1` in the environment `auto` is the CPU.

    Raises:
        ConfigError: the device doesn't exist, or there are more processes than GPUs on this machine.
    """

    def __init__(self, kind: Kind = "auto") -> None:
        if kind == "auto":
            kind = _best_kind()
        elif kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device", place="device", got=kind, fix="use `auto` or `cpu`")
        elif kind == "mps" and not torch.backends.mps.is_available():
            raise ConfigError("there is no MPS device", place="device", got=kind, fix="use `auto` or `cpu`")
        index = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
        if kind == "cuda" and index >= torch.cuda.device_count():
            raise ConfigError(
                "more processes than GPUs on this machine",
                place="distributed",
                got=f"local rank {index} with {torch.cuda.device_count()} GPUs",
                fix=f"start at most {torch.cuda.device_count()} processes per machine",
            )

    @property
    def kind(self) -> str:
        return self.device.type

    def supports(self, precision: str) -> bool:
        """Tell whether matrix products can run in a precision (`float32`, `bf16` or `fp16`) on this device."""
        if precision == "bf16" and self.kind == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return precision in _DTYPES

    def check(self, precision: str) -> None:
        """Raise a `ConfigError` where the device doesn't support a precision."""
        if not self.supports(precision):
            raise ConfigError(
                f"precision `{precision}` does not run on this device",
                place="precision",
                got=self.name,
                fix="use `fp16` or `float32`",
            )

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Return a context in which matrix products run in `precision`; weights keep their dtype."""
        if precision == "float32":
            return nullcontext()
        return torch.autocast(self.kind, dtype=_DTYPES[precision])

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.kind == "cuda" else self.kind

    def describe(self) -> dict[str, Any]:
        """Return the device's kind, name, memory in bytes and capabilities as JSON values, for a run's record."""
        about: dict[str, Any] = {"kind": self.kind, "name": self.name, "bf16": self.supports("bf16")}
        if self.kind == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            about |= {"memory_bytes": properties.total_memory, "capability": [properties.major, properties.minor]}
        else:
            import psutil

            about |= {"memory_bytes": psutil.virtual_memory().total, "cores": os.cpu_count()}
        return about

    def peak_memory(self) -> int:
        """Return the peak memory so far in bytes: allocated on a GPU, else resident memory of the process."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if os.name == "posix":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
        import psutil

        return psutil.Process().memory_info().rss

    def release(self) -> None:
        """Release cached, unused memory of the device."""
        release_memory(self.device)


def _best_kind() -> Kind:
    """Return what `auto` means here."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def release_memory(device: torch.device) -> None:
    """Collect garbage and release a device's cached, unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the device's or the host's memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
