"""How windows are cut into micro-batches, and into smaller ones once memory has run out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from rlhf_core.config.training import TrainerConfig
from rlhf_core.contracts.batch import Batch

CACHED_NUMBERS = 3 * 2**17
"""Numbers in the hidden states of a micro-batch on a CPU, 1.5 MiB in float32. With more, what one layer writes has left the cache
before the next one reads it; with half as many, the gradients of all weights are added up more often than that saves."""


class MicroBatches:
    """Cuts windows into micro-batches. The gradient of a step depends on their size by rounding alone.

    Args:
        divide: whether a prompt's responses may be in several micro-batches; sizes then count responses, else prompts.
    """

    def __init__(self, config: TrainerConfig, *, divide: bool = False) -> None:
        self.size, self.divide = config.micro_batch_size, divide
        tokens = config.batching.micro_batch_tokens
        self.max_tokens = None if tokens == "auto" else tokens
        self._auto = tokens == "auto"
        self._by_length = config.batching.length_grouped

    def fit(self, device: torch.device, width: int | None) -> None:
        """Bound the tokens of a micro-batch by what suits the device, where the configuration leaves that open.

        Args:
            width: of the widest model's hidden states; None where it isn't known, and nothing is bounded.
        """
        if self._auto and device.type == "cpu" and width:
            self.max_tokens = max(1, CACHED_NUMBERS // width)

    @property
    def unit(self) -> str:
        """What a size counts: `response` or `prompt`."""
        return "response" if self.divide else "prompt"

    def cut(self, window: Batch) -> list[Batch]:
        """Return the window's micro-batches; none where it has no rows."""
        return self._cut(window, self.divide)

    def cut_between_prompts(self, window: Batch) -> list[Batch]:
        """Return the window's micro-batches, all responses of a prompt in the same one."""
        return self._cut(window, False)

    def _cut(self, window: Batch, divide: bool) -> list[Batch]:
        if not window.num_prompts:
            return []
        return window.split(size=self.size, max_tokens=self.max_tokens, by_length=self._by_length, divide=divide)

    def count(self, micro: Batch) -> int:
        """Return the size of a micro-batch: its responses or prompts, as `unit` says."""
        return micro.num_responses if self.divide else micro.num_prompts

    def halve(self, largest: int) -> bool:
        """Halve the size for all later windows; return False where it can't be halved.

        Args:
            largest: the size of the largest micro-batch that didn't fit, over all processes.
        """
        if largest <= 1:
            return False
        self.size = math.ceil(largest / 2)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the size, which memory may have made smaller than the configuration's, as JSON values."""
        return {"size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the size that memory allowed, unless the configuration asks for a smaller one now."""
        sizes = [size for size in (self.size, state["size"]) if size is not None]
        self.size = min(sizes, default=None)
