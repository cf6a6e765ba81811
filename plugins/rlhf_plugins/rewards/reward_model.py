"""A trained reward model as a reward; for an ensemble, the mean less a multiple of the members' standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from pydantic import Field

from rlhf_core.plugin import (
    Batch,
    ConfigError,
    ModelReward,
    ModelRewardConfig,
    RewardModel,
    Sample,
    SampleScores,
    ScoringModelConfig,
)


class RewardModelRewardConfig(ModelRewardConfig):
    """Options of the reward by a reward model."""

    model: ScoringModelConfig = Field(
        description="Path or hub name of the reward model: one of `rlhf train reward_model`, or a classifier."
    )
    doubt_weight: float = Field(
        0.0,
        ge=0,
        description="How many standard deviations of an ensemble's members are subtracted from their mean; larger trusts scores"
        " on which members differ less. Needs members trained with `centre_weight`.",
    )


class RewardModelReward(ModelReward[RewardModel]):
    """Scores completions by a trained reward model, or by a classifier from the hub."""

    api = 1
    Config = RewardModelRewardConfig
    config: RewardModelRewardConfig
    kind = RewardModel

    def check(self, model: RewardModel) -> None:
        """Refuse `doubt_weight` for a model whose members' standard deviation means nothing.

        Raises:
            ConfigError: the model has one member, or members that weren't centred in training.
        """
        weight, source = self.config.doubt_weight, self.config.model.path
        if not weight:
            return
        if model.members == 1:
            raise ConfigError(
                "`doubt_weight` needs an ensemble; this reward model has one member",
                place="doubt_weight",
                got=f"{weight:g} for {source}",
                fix="set `doubt_weight: 0`, or train an ensemble: `rlhf train reward_model --ensemble.size 4"
                " --centre_weight 0.01`",
            )
        if not model.centred:
            # Ranking leaves each member's scores an arbitrary constant, which would count as disagreement.
            raise ConfigError(
                "the ensemble was trained without `centre_weight`, so its members' scores aren't comparable",
                place="doubt_weight",
                got=f"{weight:g} for {source}",
                fix="train the ensemble with `centre_weight` above 0 (0.01 is usual), or set `doubt_weight: 0`",
            )

    @cached_property
    def _scores(self) -> SampleScores[float]:
        return SampleScores(self._score, self.model, self.config)

    def _score(self, batch: Batch) -> list[float]:
        """Return each completion's score: the members' mean less `doubt_weight` of their standard deviations."""
        scores = self.model.scores(batch)  # (R, K)
        deviation = scores.std(dim=1) if self.model.members > 1 else 0.0
        return (scores.mean(dim=1) - self.config.doubt_weight * deviation).tolist()

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return the members' mean for each sample, less `doubt_weight` of their standard deviations."""
        return self._scores(samples)
