"""A trained process reward model as a reward: a score for each step, and one for the whole completion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from rlhf_core.plugin import (
    AGGREGATIONS,
    Batch,
    ModelReward,
    ModelRewardConfig,
    ProcessRewardModel,
    ProcessRewardReader,
    Sample,
    SampleScores,
    ScoringModelConfig,
    StepReader,
)


class ProcessRewardRewardConfig(ModelRewardConfig):
    """Options of the reward by a process reward model."""

    model: ScoringModelConfig = Field(description="Path of the model: one of `rlhf train process_reward`.")
    aggregation: Literal["min", "product", "mean", "last", "outcome"] = Field(
        "min",
        description="How step scores become the completion's score: the worst, their product, mean, or the last; or `outcome`,"
        " the model's score of the whole completion.",
    )


class ProcessRewardReward(ModelReward[ProcessRewardModel]):
    """Scores completions, and each of their steps, by a trained process reward model."""

    api = 1
    Config = ProcessRewardRewardConfig
    config: ProcessRewardRewardConfig
    kind = ProcessRewardModel

    @cached_property
    def _scores(self) -> SampleScores[tuple[float, list[float]]]:
        return SampleScores(self._score, self.model, self.config)

    def _score(self, batch: Batch) -> list[tuple[float, list[float]]]:
        """Return for each completion its score and its steps' probabilities of being right so far."""
        ends = self.model.step_ends(batch)
        steps, outcome = self.model.scores(batch, ends)
        kind = self.config.aggregation
        scores = outcome if kind == "outcome" else AGGREGATIONS[kind](steps, ends)
        probabilities = [row[at].tolist() for row, at in zip(steps.sigmoid().cpu(), ends.cpu(), strict=True)]
        return list(zip(scores.tolist(), probabilities, strict=True))

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return each completion's score: log-odds of being right, or for `product` a log-probability, nats."""
        return [score for score, _ in self._scores(samples)]

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Return for each step of each completion the probability that the solution is right so far."""
        return [steps for _, steps in self._scores(samples)]

    def step_reader(self, tokenizer: Any) -> StepReader | None:
        """Return what scores the steps of growing completions as `score_steps` does, reading each token once."""
        return ProcessRewardReader.of(self.model, self._scores, tokenizer, separator=self.model.separator)
