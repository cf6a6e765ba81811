"""Rewards to try the contract on: sound ones, and broken ones with one fault each."""

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
    """Gives the lowest of two rewards, which it prepares when the run does."""

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
    """Returns one score for all."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return super().score(samples)[:1]


class NoScore(Length):
    """Has no score for what it can't read."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [None if "-" in str(sample.prompt) else 1.0 for sample in samples]  # type: ignore[misc]


class Unordered(Length):
    """Returns the scores sorted."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return sorted(super().score(samples))


class Relative(Length):
    """Scores a sample by its place among the others."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        scores = super().score(samples)
        return [score - max(scores) for score in scores]


class Noisy(Length):
    """Adds noise."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [score + 1e-7 * random.random() for score in super().score(samples)]


class Writes(Length):
    """Notes its score in the sample's columns."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        for sample in samples:
            sample.columns["length"] = len(sample.completion)  # type: ignore[index]
        return super().score(samples)


class BadSteps(Length):
    """Gives a step a score that isn't a number."""

    api = 1

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        return [[1.0, float("nan")] for _ in samples]


class Loose(Length):
    """Returns steps in an order of its own."""

    api = 1

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        return [[score] for score in sorted(self.score(samples))]


class Numbered(Length):
    """Adds the group's number."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [score + sample.group for score, sample in zip(super().score(samples), samples, strict=True)]


class Fussy(Length):
    """Has no score for what was cut off."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        scores = super().score(samples)
        return [
            math.nan if sample.stop_reason == "length" else score for score, sample in zip(scores, samples, strict=True)
        ]


class PerWord(Length):
    """Divides by the number of words."""

    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [len(sample.completion) / len(sample.completion.split()) for sample in samples]


class Masked(Length):
    """Asks whether there is a mask as if it were a number."""

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
    """Has an option that does nothing."""

    api = 1
    Config = ScaledConfig


class Dated(Length):
    """Describes itself by a number of its own."""

    api = 1

    def describe(self) -> dict[str, Any]:
        return {"made": random.random()}


class Opaque(Length):
    """Describes itself by what isn't JSON."""

    api = 1

    def describe(self) -> dict[str, Any]:
        return {"samples": Sample}


class OfGroup(Length):
    """Rewards being longer than the others of a group, as a group's reward may."""

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
