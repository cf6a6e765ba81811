"""How a window is cut for the memory there is; when memory runs out, smaller micro-batches from then on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_core.batch import Batch
from rlhf_core.config import TrainerConfig


class MicroBatches:
    """Cuts windows into micro-batches. The step's gradient doesn't depend on the cut beyond rounding."""

    def __init__(self, config: TrainerConfig) -> None:
        self.max_prompts = config.micro_batch_size
        self.max_tokens = config.batching.micro_batch_tokens
        self._by_length = config.batching.length_grouped

    def cut(self, window: Batch) -> list[Batch]:
        """Return the window's micro-batches; those without prompts are left out."""
        if not window.num_prompts:
            return []
        return window.split(size=self.max_prompts, max_tokens=self.max_tokens, by_length=self._by_length)

    def halve(self, largest: int) -> bool:
        """Allow half as many prompts a micro-batch as the `largest` one had; False where that one had a single prompt."""
        if largest <= 1:
            return False
        self.max_prompts = math.ceil(largest / 2)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"max_prompts": self.max_prompts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a size that memory forced on the run, unless a smaller one was asked for since."""
        sizes = [size for size in (self.max_prompts, state["max_prompts"]) if size is not None]
        self.max_prompts = min(sizes, default=None)


def halves(micro: Batch) -> list[Batch]:
    """Cut a micro-batch of several prompts in two."""
    return micro.split(size=math.ceil(micro.num_prompts / 2))
