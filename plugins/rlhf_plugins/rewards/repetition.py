"""How much a completion repeats itself."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Literal

from pydantic import Field

from rlhf_core.plugin import BaseConfig, RewardFn, Sample

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")
"""Words; in Chinese and Japanese, which have no blanks, characters. Punctuation counts, so that `!!!!` repeats."""


class RepetitionConfig(BaseConfig):
    """Options of the penalty for repetition."""

    n: int = Field(
        4, ge=1, description="Words in a row that count as repeated; larger punishes longer repeated passages alone."
    )
    unit: Literal["words", "tokens"] = Field(
        "words", description="What n-grams are made of: words of the text, or the token ids that the policy drew."
    )
    allowed: float = Field(
        0.0, ge=0, lt=1, description="Share of repeated n-grams that costs nothing; larger forgives more repetition."
    )


class RepetitionReward(RewardFn):
    """Scores repetition: 0 where no n-gram occurs twice, down to -1 where all are the same.

    With N n-grams of which D are different, the repeated share is r = 1 - D / N, and the score is
    -max(0, r - allowed) / (1 - allowed). It is 0 for a completion of fewer than n words. This is the penalty per completion
    that goes back to the n-gram penalty per token of Yeo et al. 2025 (arXiv 2502.03373, "Demystifying Long Chain-of-Thought
    Reasoning"), and 1 - r is the distinct-n of Li et al. 2016 (arXiv 1510.03055).
    """

    api = 1
    Config = RepetitionConfig
    config: RepetitionConfig

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return the penalty for each completion's repetition, between -1 and 0."""
        allowed = self.config.allowed
        shares = [repeated_share(self._units(sample), self.config.n) for sample in samples]
        return [0.0 - max(0.0, share - allowed) / (1 - allowed) for share in shares]

    def _units(self, sample: Sample) -> Sequence[Hashable]:
        """Return the words or tokens of a completion; the words of one without token ids."""
        if self.config.unit == "tokens" and len(sample.completion_ids):
            mask = sample.mask if sample.mask is not None else [True] * len(sample.completion_ids)
            return [token for token, own in zip(sample.completion_ids, mask, strict=True) if own]
        return _WORDS.findall(sample.completion.casefold())


def repeated_share(units: Sequence[Hashable], n: int) -> float:
    """Return the share of n-grams that occurred before; 0 where there are none."""
    grams = list(zip(*(units[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
