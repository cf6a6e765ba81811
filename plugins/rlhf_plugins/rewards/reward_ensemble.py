"""Several rewards as one, careful where they disagree: their mean, their least, or their mean less a measure of their spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.plugin import BaseConfig, RewardConfig, RewardFn, Rewards, Sample, ScoreWithParts, open_rewards


def _mean(scores: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / math.fsum(weights)


def _variance(scores: Sequence[float], weights: Sequence[float]) -> float:
    mean = _mean(scores, weights)
    return _mean([(score - mean) ** 2 for score in scores], weights)


COMBINATIONS: dict[str, Callable[[Sequence[float], Sequence[float], float], float]] = {
    "mean": lambda scores, weights, doubt: _mean(scores, weights),
    "min": lambda scores, weights, doubt: min(scores),
    "mean_less_std": lambda scores, weights, doubt: (
        _mean(scores, weights) - doubt * math.sqrt(_variance(scores, weights))
    ),
    "mean_less_variance": lambda scores, weights, doubt: _mean(scores, weights) - doubt * _variance(scores, weights),
}
"""How members' scores become one, from (scores, weights, doubt_weight). Coste et al. 2023 (arXiv 2310.02743): `min` is their
worst-case optimisation, `mean_less_variance` their uncertainty-weighted one; `mean_less_std` is on the scale of scores."""


class EnsembleRewardConfig(BaseConfig):
    """Options of an ensemble of rewards."""

    members: list[RewardConfig] = Field(
        min_length=2,
        description="Rewards on one scale, such as reward models trained alike with other seeds: names, or `{name: …, options:"
        " …}`; more of them tell better where they disagree, and cost more. A `weight` counts in mean and spread.",
    )
    combine: str = Field(
        "mean_less_std",
        description="`mean`; `min`, the most careful; `mean_less_std` or `mean_less_variance`, the mean less `doubt_weight` times"
        " the members' standard deviation or variance.",
    )
    doubt_weight: float = Field(
        1.0, ge=0, description="Factor of the spread that is subtracted; larger trusts scores on which members agree."
    )

    @field_validator("combine")
    @classmethod
    def _known(cls, combine: str) -> str:
        if combine not in COMBINATIONS:
            raise ValueError(f"must be one of {', '.join(COMBINATIONS)}")
        return combine

    @model_validator(mode="after")
    def _options_are_used(self) -> EnsembleRewardConfig:
        if "doubt_weight" in self.model_fields_set and not self.combine.startswith("mean_less"):
            raise ValueError(f"doubt_weight has no meaning with combine {self.combine}")
        weights = [one.weight for one in self.members]
        if min(weights) <= 0:
            raise ValueError("a member's `weight` must be above 0: leave the member out")
        if self.combine == "min" and set(weights) != {1.0}:
            raise ValueError("weights of members have no meaning with combine min")
        return self


class EnsembleReward(RewardFn):
    """Several rewards as one: their mean, their least, or their mean less their spread (Coste et al. 2023, arXiv 2310.02743).

    With members' scores s_k and weights w_k, μ = Σ w_k s_k / Σ w_k and σ² = Σ w_k (s_k - μ)² / Σ w_k; the score is μ, min s_k,
    μ - doubt_weight σ, or μ - doubt_weight σ². Each member's score and `std` (σ) are logged as parts.
    """

    api = 1
    Config = EnsembleRewardConfig
    config: EnsembleRewardConfig

    def __init__(self, config: EnsembleRewardConfig | None = None, *, members: Rewards | None = None) -> None:
        super().__init__(config)
        self.members = open_rewards(self.config.members, place="members") if members is None else members

    @classmethod
    def of(cls, members: Sequence[Any], **options: Any) -> Self:
        """Return the ensemble of rewards in memory: functions, `RewardFn`s, names, or pairs (reward, weight)."""
        opened = open_rewards(list(members), place="members")
        named = [{"name": name, "weight": weight} for name, weight in zip(opened.names, opened.weights, strict=True)]
        return cls(cls.Config.parse({"members": named, **options}), members=opened)

    def prepare(self) -> None:
        self.members.prepare()

    def describe(self) -> dict[str, Any]:
        """Return what each member's scores depend on."""
        return {"members": self.members.describe()}

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return the combined score of each sample, with its members' scores as parts."""
        if not samples:
            return []
        found, weights = self.members.score(samples).by_name, self.members.weights
        combine = COMBINATIONS[self.config.combine]
        scores: list[float] = []
        for each in zip(*found.values(), strict=True):
            parts = dict(zip(found, each, strict=True)) | {"std": math.sqrt(_variance(each, weights))}
            scores.append(ScoreWithParts(combine(each, weights, self.config.doubt_weight), parts))
        return scores
