"""Random streams: a draw is a function of (seed, name of the stream, indices), and global states can be restored."""

from __future__ import annotations

import base64
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def stream_seed(seed: int, name: str, *index: int) -> int:
    """Return the 63-bit seed of a named stream; streams of other names or indices share nothing."""
    digest = hashlib.sha256(repr((int(seed), name, *map(int, index))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_generator(*key: int) -> np.random.Generator:
    """Return the generator that belongs to these numbers, whatever was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def completion_seeds(
    seed: int,
    name: str,
    *index: int,
    rows: Sequence[int],
    n: int,
    met: Counter[tuple[int, ...]] | None = None,
    places: Sequence[int] = (),
) -> list[list[int]]:
    """Return for each row the seeds of n completions: functions of (seed, name, index, row, place, occurrence, sample) alone.

    So a completion doesn't depend on which rows are sampled with it, in which order, or by which process.

    Args:
        rows: numbers that name the rows; one that stands here again, or was met before, is another occurrence of it.
        met: how often each row was met before at its place; counted on here.
        places: what tells a row from itself where it comes again and another process may hold it; () where none does.
    """
    met = Counter() if met is None else met
    seeds = []
    for key in zip(rows, places, strict=True) if places else ((row,) for row in rows):
        seeds.append([stream_seed(seed, name, *index, *key, met[key], sample) for sample in range(n)])
        met[key] += 1
    return seeds


def seed_everything(seed: int, name: str, *index: int) -> None:
    """Seed Python's, numpy's and torch's global generators from a named stream."""
    value = stream_seed(seed, name, *index)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


@dataclass(frozen=True)
class RandomState:
    """The states of all global generators of a process: Python's, numpy's, torch's on the host and on its device."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch_cpu: Tensor
    device: Tensor | None
    """State of the accelerator's generator, where there is one."""

    @classmethod
    def capture(cls) -> RandomState:
        device = None
        if torch.cuda.is_available():
            device = torch.cuda.get_rng_state()
        elif torch.backends.mps.is_available():
            device = torch.mps.get_rng_state()
        return cls(random.getstate(), tuple(np.random.get_state(legacy=True)), torch.get_rng_state(), device)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.device is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.device)
        elif self.device is not None and torch.backends.mps.is_available():
            torch.mps.set_rng_state(self.device)

    def to_json(self) -> dict[str, Any]:
        version, words, gauss = self.python
        name, keys, position, has_gauss, cached = self.numpy
        return {
            "python": [version, list(words), gauss],
            "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
            "torch_cpu": _encode(self.torch_cpu),
            "device": None if self.device is None else _encode(self.device),
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> RandomState:
        version, words, gauss = state["python"]
        name, keys, *rest = state["numpy"]
        return cls(
            (version, tuple(words), gauss),
            (name, np.array(keys, dtype=np.uint32), *rest),
            _decode(state["torch_cpu"]),
            None if state["device"] is None else _decode(state["device"]),
        )


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
