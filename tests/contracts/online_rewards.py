"""Rewards for the tests of the contracts: a function and a class, as third parties write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rlhf_core.plugin import BaseConfig, RewardFn, Sample


def digits(completions: Sequence[str], **columns: Any) -> list[float]:
    """Score a completion by the share of its characters that are digits: dense, so that a random model learns it in seconds."""
    return [sum(one.isdigit() for one in text) / max(len(text), 1) for text in completions]


class EndsConfig(BaseConfig):
    """Options of the reward for an end."""

    worth: float = Field(1.0, description="Score of a completion that ends by itself; larger rewards it more.")


class Ends(RewardFn):
    """Rewards a completion that ends by itself."""

    api = 1
    Config = EndsConfig

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self.config.worth * (sample.stop_reason == "end") for sample in samples]  # type: ignore[attr-defined]


def rare(completions: Sequence[str], **columns: Any) -> list[float]:
    """Score whether there is a digit in the first three characters, which a random model seldom writes."""
    return [float(any(one.isdigit() for one in text[:3])) for text in completions]


def alike(completions: Sequence[str], **columns: Any) -> list[float]:
    """Score all the same."""
    return [1.0] * len(completions)


def ends_or_digits(completions: Sequence[str], stop_reasons: Sequence[str]) -> list[float]:
    """Score an end, and a little each digit, so that completions of both kinds differ."""
    return [
        (stop == "end") + sum(map(str.isdigit, text)) / 8 for text, stop in zip(completions, stop_reasons, strict=True)
    ]
