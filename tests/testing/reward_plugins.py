"""Rewards to test the contract with: correct ones, and ones with one fault each."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.rewards import open_rewards
from rlhf_core.testing.arithmetic_task import step_labels, verify


class Exact(RewardFn):
    """Rewards the right answer, and each right step."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(verify(sample.prompt, sample.completion)) for sample in samples]

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        return [[float(label) for label in step_labels(sample.prompt, sample.completion)] for sample in samples]


class Length(RewardFn):
    """Rewards length."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(sample.completion)) for sample in samples]


class Lowest(RewardFn):
    """Returns the lowest of two rewards, which it prepares in `prepare`."""

    api = 1

    def __init__(self, config: BaseConfig | None = None) -> None:
        super().__init__(config)
        self.rewards = open_rewards([Length, length])

    def prepare(self) -> None:
        self.rewards.prepare()
        self.ready = True

    def describe(self) -> dict[str, Any]:
        return self.rewards.describe()

    def score(self, samples: Sequence[Sample]) -> list[float]:
        assert self.ready
        return [min(scores) for scores in zip(*self.rewards.score(samples).by_name.values(), strict=True)]


class OneScore(Length):
    """Returns one score for all samples."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return super().score(samples)[:1]


class NoScore(Length):
    """Returns None for prompts with a minus sign."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [None if "-" in str(sample.prompt) else 1.0 for sample in samples]  # type: ignore[misc]


class Unordered(Length):
    """Returns the scores sorted instead of in the order of the samples."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return sorted(super().score(samples))


class Relative(Length):
    """Scores a sample relative to the best of the batch."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        scores = super().score(samples)
        return [score - max(scores) for score in scores]


class Noisy(Length):
    """Adds random noise to scores."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [score + 1e-7 * random.random() for score in super().score(samples)]


class Writes(Length):
    """Writes into the samples' columns."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        for sample in samples:
            sample.columns["length"] = len(sample.completion)  # type: ignore[index]
        return super().score(samples)


class BadSteps(Length):
    """Returns NaN for a step."""

    api = 1

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        return [[1.0, float("nan")] for _ in samples]


class Loose(Length):
    """Returns step scores sorted instead of in the order of the samples."""

    api = 1

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        return [[score] for score in sorted(self.score(samples))]


class Numbered(Length):
    """Adds the group's number."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [score + sample.group for score, sample in zip(super().score(samples), samples, strict=True)]


class Fussy(Length):
    """Returns NaN for truncated completions."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        scores = super().score(samples)
        return [
            math.nan if sample.stop_reason == "length" else score for score, sample in zip(scores, samples, strict=True)
        ]


class PerWord(Length):
    """Divides by the number of words, which may be 0."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [len(sample.completion) / len(sample.completion.split()) for sample in samples]


class Masked(Length):
    """Multiplies by the mask as if it were a number."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(sample.completion) + 0 * (sample.mask or 0)) for sample in samples]  # type: ignore[operator]


class ScaledConfig(BaseConfig):
    scale: float = Field(1.0, description="Factor of the scores; larger counts more.")


class Scaled(Length):
    """Rewards length, scaled."""

    api = 1
    Config = ScaledConfig
    config: ScaledConfig

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self.config.scale * score for score in super().score(samples)]


class Unscaled(Length):
    """Ignores its option `scale`."""

    api = 1
    Config = ScaledConfig


class Dated(Length):
    """Describes itself by a random number."""

    api = 1

    def describe(self) -> dict[str, Any]:
        return {"made": random.random()}


class Opaque(Length):
    """Describes itself by a value that JSON can't hold."""

    api = 1

    def describe(self) -> dict[str, Any]:
        return {"samples": Sample}


class OfGroup(Length):
    """Rewards being longer than the mean of the group; a reward may depend on its group."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        scores = super().score(samples)
        means = {
            group: statistics.fmean(
                score for score, sample in zip(scores, samples, strict=True) if sample.group == group
            )
            for group in {sample.group for sample in samples}
        }
        return [score - means[sample.group] for score, sample in zip(scores, samples, strict=True)]


def length(completions: Sequence[str], answer: Sequence[str], scale: float = 1.0) -> list[float]:
    """Rewards length."""
    return [scale * len(text) for text in completions]
