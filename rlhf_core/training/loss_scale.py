"""The loss scale of float16, without which small gradients would round to zero. Other precisions need none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LossScale:
    """A power of two: the loss is multiplied by it before the backward pass, the gradients are divided by it afterwards.

    An overflow halves it, and the same update is made again; 2,000 updates in a row without an overflow double it.

    Args:
        enabled: False keeps it at 1.
    """

    GROWTH_INTERVAL = 2000
    """Updates in a row without an overflow, after which the scale is doubled."""

    def __init__(self, *, enabled: bool) -> None:
        self.value = 2.0**16 if enabled else 1.0
        self._enabled = enabled
        self._good = 0

    def overflowed(self) -> bool:
        """Halve the scale after a gradient that isn't finite; return False where it can't be halved."""
        if not self._enabled or self.value <= 1:
            return False
        self.value /= 2
        self._good = 0
        return True

    def succeeded(self) -> None:
        """Count an update whose gradients were finite."""
        self._good += 1
        if self._enabled and self._good >= self.GROWTH_INTERVAL:
            self.value = min(self.value * 2, 2.0**24)
            self._good = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the number of updates since it changed, as JSON values."""
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.value, self._good = float(state["value"]), int(state["good"])
