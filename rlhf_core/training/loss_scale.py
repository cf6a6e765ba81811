"""The loss scale of float16, whose small gradients would otherwise round to zero. Other precisions need none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LossScale:
    """A power of two by which the loss is multiplied before, and gradients divided after, the backward pass.

    An overflow halves it and the same update is made again; 2,000 updates in a row without one double it.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, *, enabled: bool) -> None:
        self.value = 2.0**16 if enabled else 1.0
        self._enabled = enabled
        self._good = 0

    def overflowed(self) -> bool:
        """Take note of a gradient that isn't finite; return whether a smaller scale is left to try."""
        if not self._enabled or self.value <= 1:
            return False
        self.value /= 2
        self._good = 0
        return True

    def succeeded(self) -> None:
        """Take note of an update."""
        self._good += 1
        if self._enabled and self._good >= self.GROWTH_INTERVAL:
            self.value = min(self.value * 2, 2.0**24)
            self._good = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self._good = float(state["value"]), int(state["good"])
