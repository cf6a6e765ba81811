"""In which direction a metric improves, as its name tells."""

from __future__ import annotations

import re
from typing import Literal

_SMALLER = {"loss", "perplexity", "nll", "kl", "error", "ece", "brier"}
_LARGER = {"reward", "rewards", "accuracy", "margin", "auc", "pass", "majority", "score", "f1"}
_NEITHER = {"std", "se", "rejected", "undesirable", "max", "min"}
"""Words of figures that have no better direction, such as the spread of a reward, or the reward of rejected responses."""


def better_when(metric: str) -> Literal["min", "max"] | None:
    """Return whether smaller (`min`) or larger (`max`) values of a metric are better; None where its name doesn't tell.

    Args:
        metric: its name as logged, such as `eval_loss` or `eval_rewards/margin`.
    """
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    smaller, larger = bool(words & _SMALLER), bool(words & _LARGER)
    if smaller == larger or words & _NEITHER:
        return None
    return "min" if smaller else "max"
