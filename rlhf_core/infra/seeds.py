"""Random streams, whose seed is a function of (run's seed, stream's name, indices), and the states of global generators."""

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
    """Return the 63-bit seed of a named random stream; another name or index gives an independent one."""
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
    """Return n completion seeds for each row, as functions of (seed, name, index, row, place, occurrence, sample) alone.

    So a completion doesn't depend on which other rows are sampled with it, in which order, or by which process.

    Args:
        rows: the rows' numbers in the data; a repeated number, here or in `met`, is a further occurrence of the row.
        n: completions per row.
        met: how often each (row, place) occurred before; this call adds its own.
        places: one number per row that tells its occurrences on different processes apart; () where rows don't repeat.

    Returns:
        For each row, a list of n seeds.
    """
    met = Counter() if met is None else met
    seeds = []
    for key in zip(rows, places, strict=True) if places else ((row,) for row in rows):
        seeds.append([stream_seed(seed, name, *index, *key, met[key], sample) for sample in range(n)])
        met[key] += 1
    return seeds


def seed_everything(seed: int, name: str, *index: int) -> None:
    """Seed the global generators of Python, numpy and torch with `stream_seed(seed, name, *index)`."""
    value = stream_seed(seed, name, *index)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


@dataclass(frozen=True)
class RandomState:
    """The states of a process's global random generators: Python's, numpy's, torch's on the CPU and on its device."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch_cpu: Tensor
    device: Tensor | None
    """State of the generator of the CUDA or MPS device; None without one."""

    @classmethod
    def capture(cls) -> RandomState:
        """Return the current states."""
        device = None
        if torch.cuda.is_available():
            device = torch.cuda.get_rng_state()
        elif torch.backends.mps.is_available():
            device = torch.mps.get_rng_state()
        return cls(random.getstate(), tuple(np.random.get_state(legacy=True)), torch.get_rng_state(), device)

    def restore(self) -> None:
        """Set the global generators to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.device is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.device)
        elif self.device is not None and torch.backends.mps.is_available():
            torch.mps.set_rng_state(self.device)

    def to_json(self) -> dict[str, Any]:
        """Return the states as JSON values, for a checkpoint."""
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
        """Return the states that `to_json` returned."""
        version, words, gauss = state["python"]
        name, keys, *rest = state["numpy"]
        return cls(
            (version, tuple(words), gauss),
            (name, np.array(keys, dtype=np.uint32), *rest),
            _decode(state["torch_cpu"]),
            None if state["device"] is None else _decode(state["device"]),
        )


def _encode(state: Tensor) -> str:
    """Return a generator's state as base64 text."""
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
