"""Whether a completion has the length that is wanted, or is too long."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import BaseConfig, RewardFn, Sample

log = logging.getLogger(__name__)

_WORDS = re.compile(r"\w+|[^\w\s]")


class LengthConfig(BaseConfig):
    """Options of the reward for length. `target` and `max_length` may be combined."""

    target: int | None = Field(None, ge=1, description="Wanted length; larger asks for longer completions.")
    max_length: int | None = Field(
        None, ge=1, description="Length beyond which a completion gets the full penalty; larger allows longer ones."
    )
    buffer: int = Field(
        0,
        ge=0,
        description="How far before `max_length` the penalty begins, rising linearly; larger warns earlier, 0 makes one step.",
    )
    unit: Literal["tokens", "characters"] = Field(
        "tokens", description="What is counted: tokens that the policy wrote, its end token included, or characters."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LengthConfig:
        if self.target is None and self.max_length is None:
            raise ValueError("set `target`, `max_length`, or both: without them every length scores the same")
        if self.max_length is None and self.buffer:
            raise ValueError("`buffer` lies before `max_length`, which isn't set")
        if self.max_length is not None and self.buffer > self.max_length:
            raise ValueError(f"`buffer` ({self.buffer}) is larger than `max_length` ({self.max_length})")
        return self


class LengthReward(RewardFn):
    """Scores length: 0 for the wanted one, down to -1 for one far from `target` or beyond `max_length`.

    With L the completion's length: for a target T, -min(1, |L - T| / T), which is the length term of LCPO-Exact (Aggarwal and
    Welleck 2025, arXiv 2503.04697) with α = 1 / T and a lower bound; for a maximum M with buffer B, DAPO's soft over-long
    punishment (Yu et al. 2025, arXiv 2503.14476, equation 13): 0 up to M - B, ((M - B) - L) / B up to M, and -1 beyond. With
    both, their sum.
    """

    api = 1
    Config = LengthConfig
    config: LengthConfig
    _warned = False

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return the penalty for each completion's length, at most 0."""
        return [length_score(self._length(sample), self.config) for sample in samples]

    def _length(self, sample: Sample) -> int:
        """Return how many tokens or characters a completion has."""
        if self.config.unit == "characters":
            return len(sample.completion)
        if sample.mask is not None:
            return sum(map(bool, sample.mask))
        if len(sample.completion_ids) or not sample.completion:
            return len(sample.completion_ids)
        if not self._warned:
            self._warned = True
            log.warning(
                "reward `length`: texts without token ids are measured in words and punctuation marks (reported once)"
            )
        return len(_WORDS.findall(sample.completion))


def length_score(length: int, config: LengthConfig) -> float:
    """Return the score of a length: the sum of the terms of `target` and `max_length`."""
    score = 0.0
    if config.target is not None:
        score -= min(1.0, abs(length - config.target) / config.target)
    if config.max_length is not None:
        over = length - (config.max_length - config.buffer)
        score -= 1.0 if length > config.max_length else max(0, over) / config.buffer if config.buffer else 0.0
    return score
