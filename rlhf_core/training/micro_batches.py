"""How a window is cut for the memory there is; when memory runs out, smaller micro-batches from then on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_core.config.training import TrainerConfig
from rlhf_core.contracts.batch import Batch


class MicroBatches:
    """Cuts windows into micro-batches. The step's gradient doesn't depend on the cut beyond rounding.

    Args:
        divide: whether a cut may fall between a prompt's responses; a size then counts responses, and else prompts.
    """

    def __init__(self, config: TrainerConfig, *, divide: bool = False) -> None:
        self.size, self.divide = config.micro_batch_size, divide
        self.max_tokens = config.batching.micro_batch_tokens
        self._by_length = config.batching.length_grouped

    @property
    def unit(self) -> str:
        """What a size counts."""
        return "response" if self.divide else "prompt"

    def cut(self, window: Batch) -> list[Batch]:
        """Return the window's micro-batches; those without rows are left out."""
        return self._cut(window, self.divide)

    def cut_between_prompts(self, window: Batch) -> list[Batch]:
        """Return the window's micro-batches, each prompt with all of its responses."""
        return self._cut(window, False)

    def _cut(self, window: Batch, divide: bool) -> list[Batch]:
        if not window.num_prompts:
            return []
        return window.split(size=self.size, max_tokens=self.max_tokens, by_length=self._by_length, divide=divide)

    def count(self, micro: Batch) -> int:
        """Return the size of a micro-batch."""
        return micro.num_responses if self.divide else micro.num_prompts

    def halve(self, largest: int) -> bool:
        """Allow half the size of the `largest` micro-batch from now on; False where that was a single row."""
        if largest <= 1:
            return False
        self.size = math.ceil(largest / 2)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a size that memory forced on the run, unless a smaller one was asked for since."""
        sizes = [size for size in (self.size, state["size"]) if size is not None]
        self.size = min(sizes, default=None)
