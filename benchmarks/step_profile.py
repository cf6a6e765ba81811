"""Profile one training step: kernels and their launches, waits and copies, and the operations that take the most time."""

from __future__ import annotations

import collections
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 4
"""Steps that a profile needs: to warm the profiler up, to profile, to count operations, to find waits; one each."""
TOP = 15
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "hipLaunch", "hipExtLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")

FREE = ("_unsafe_view", "lift_fresh")
"""Operations that compute nothing, besides views and allocations."""


class Operations(TorchDispatchMode):
    """Counts operations that compute or copy: each is a call on the CPU, and on a GPU one or a few kernels."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name in FREE or "empty" in name)
        return func(*args, **(kwargs or {}))


class StepProfile:
    """Profiles the steps after the timed ones: call `after` with a step's number at its end, as `Clock` does.

    Args:
        last: the last timed step; the `STEPS` steps after it are profiled.
    """

    def __init__(self, last: int) -> None:
        self.last, self.gpu = last, torch.cuda.is_available()
        self.found: dict[str, Any] = {}
        self._waits: collections.Counter[str] = collections.Counter()

    def after(self, step: int) -> None:
        """Do what is due after a step; at the end `found` has all results."""
        if step == self.last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if self.gpu else []
            self._profiler = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
                on_trace_ready=self.read,
            )
            self._profiler.start()
        elif step == self.last + 1:
            self._profiler.step()
        elif step == self.last + 2:
            self._profiler.step()
            self._profiler.stop()
            self._operations = Operations()
            self._operations.__enter__()
        elif step == self.last + 3:
            self._operations.__exit__(None, None, None)
            self.found["operations"] = self._operations.count
            self.watch_waits()
        elif step == self.last + 4:
            self.stop_watching()

    def read(self, profiler: Any) -> None:
        """Add the counts and times of a finished torch profile to `found`."""
        events = [event for event in profiler.events() if not _is_annotation(event)]
        on_device = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
        on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
        names = collections.Counter(event.name for event in on_host)
        copies = collections.Counter(_copy(event.name) for event in on_device)
        copies.pop("", None)
        self.found |= {
            "kernels": sum(not _copy(event.name) for event in on_device) if self.gpu else None,
            "launches": _starting(names, LAUNCHES) if self.gpu else None,
            "waits": _starting(names, WAITS) if self.gpu else None,
            "items": names["aten::_local_scalar_dense"],
            "copies": dict(copies),
            "device_ms": sum(event.time_range.elapsed_us() for event in on_device) / 1e3 if self.gpu else None,
            "top_operations": _top(_by_operation(profiler, gpu=self.gpu)),
            "top_kernels": _top((e.name, 1, e.time_range.elapsed_us() / 1e3) for e in on_device),
        }

    def watch_waits(self) -> None:
        """From now on note each line that makes the CPU wait for the GPU."""
        if self.gpu:
            self._before = warnings.showwarning, warnings.filters[:]
            warnings.simplefilter("always")
            warnings.showwarning = self._note_wait  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")

    def stop_watching(self) -> None:
        """Stop noting waits, and add them to `found`."""
        if self.gpu:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning, warnings.filters[:] = self._before  # type: ignore[misc]
            self.found["waits_at"] = dict(self._waits.most_common(TOP))

    def _note_wait(self, message: Any, *_: Any) -> None:
        if "synchroniz" in str(message):
            self._waits[_caller()] += 1


def _caller() -> str:
    """Return the innermost line that is neither torch's nor Python's, nor of this file."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name and not name.endswith("/warnings.py"):
            return f"{_short(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the backward pass"


def _is_annotation(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", False))


def _copy(name: str) -> str:
    """Return the direction in which a device event copies, such as `HtoD`; '' for a kernel."""
    if name.startswith("Memset"):
        return "set"
    return name.split()[1] if name.startswith("Memcpy") else ""


def _starting(names: collections.Counter[str], prefixes: tuple[str, ...]) -> int:
    return sum(count for name, count in names.items() if name.startswith(prefixes))


def _by_operation(profiler: Any, *, gpu: bool) -> Iterable[tuple[str, int, float]]:
    """Yield (name, calls, own milliseconds) of each operation: time on the GPU where there is one, else on the CPU."""
    for event in profiler.key_averages():
        if event.key.startswith("ProfilerStep") or _is_annotation(event):
            continue
        if gpu and event.device_type != torch.autograd.DeviceType.CPU:
            continue  # the kernel itself, which its operation counts already
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        yield event.key, event.count, own / 1e3


def _top(rows: Iterable[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """Add up rows of one name and return those that take the most time."""
    calls: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for name, count, milliseconds in rows:
        calls[name] += count
        times[name] += milliseconds  # type: ignore[assignment]
    return [
        {"name": name[:120], "calls": calls[name], "ms": round(times[name], 3)}
        for name, _ in times.most_common(TOP)
        if times[name] > 0
    ]


def _short(filename: str) -> str:
    """Return a file's path relative to the innermost directory of `sys.path` that contains it."""
    path = Path(filename)
    for root in sorted((Path(entry) for entry in sys.path if entry), key=lambda root: -len(str(root))):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return filename
