"""Rewards and prompts for the tests of methods that learn from what they generate."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rlhf_core.testing.arithmetic_task import ArithmeticTask


def digits(completions: Sequence[str], **columns: Any) -> list[float]:
    """Score a completion by the share of its characters that are digits: dense, so that a random model learns it in seconds."""
    return [sum(one.isdigit() for one in text) / max(len(text), 1) for text in completions]


def has_digit(completions: Sequence[str], **columns: Any) -> list[float]:
    """Score 1 where a digit is among the first three characters, which a random model seldom writes, else 0."""
    return [float(any(one.isdigit() for one in text[:3])) for text in completions]


@functools.cache
def prompts(split: Any = "train", count: int = 40) -> list[dict[str, Any]]:
    return list(ArithmeticTask(digits=1).rows("prompt", count, split=split, seed=0))
