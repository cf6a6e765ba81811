"""Several objectives with weights, under constraints that no amount of reward buys off."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from rlhf_core.plugin import BaseConfig, RewardConfig, RewardFn, Rewards, Sample, ScoreWithParts, open_rewards

log = logging.getLogger(__name__)


class ConstraintConfig(RewardConfig):
    """A reward whose score must stay within bounds."""

    at_least: float | None = Field(
        None, description="Least score that keeps the constraint; larger is stricter, null sets no lower bound."
    )
    at_most: float | None = Field(
        None, description="Largest score that keeps the constraint; smaller is stricter, null sets no upper bound."
    )

    @model_validator(mode="after")
    def _bounds(self) -> ConstraintConfig:
        if self.at_least is None and self.at_most is None:
            raise ValueError("set `at_least`, `at_most`, or both: without them every score keeps the constraint")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"no score is at least {self.at_least:g} and at most {self.at_most:g}")
        if self.weight != 1:
            raise ValueError("a constraint is kept or violated, so its weight has no meaning: leave it out")
        return self

    def keeps(self, score: float) -> bool:
        """Return whether a score keeps the constraint."""
        return (self.at_least is None or score >= self.at_least) and (self.at_most is None or score <= self.at_most)


class ConstitutionalConfig(BaseConfig):
    """Options of objectives under constraints."""

    objectives: list[RewardConfig] = Field(
        min_length=1,
        description="Rewards whose weighted sum is the score: names, or `{name: …, weight: …, options: …}`; more are added up.",
    )
    constraints: list[ConstraintConfig] = Field(
        min_length=1,
        description="Rewards with bounds, `{name: …, at_least: …, at_most: …}`, all of which a completion must keep; more of"
        " them allow less.",
    )
    floor: float = Field(
        -1.0,
        description="Score of a completion that violates a constraint, whatever its objectives say, and the least score of any"
        " other; set it below what the objectives give. Smaller punishes more.",
    )


class ConstitutionalRewardWrapper(RewardFn):
    """Several objectives with weights under hard constraints: a completion that violates one gets the floor.

    The score is Σ weight · objective where every constraint is kept, but at least `floor`; else `floor`. So no objective
    outweighs a constraint, and keeping them all is never worse than violating one. Constraints may be the principles of a
    constitution (Bai et al. 2022, arXiv 2212.08073): a `judge` with a principle's text is one. Logged as parts: each objective,
    `kept/NAME` (1 or 0) for each constraint, and `kept` for all.
    """

    api = 1
    Config = ConstitutionalConfig
    config: ConstitutionalConfig
    _warned = False

    def __init__(
        self,
        config: ConstitutionalConfig | None = None,
        *,
        objectives: Rewards | None = None,
        constraints: Rewards | None = None,
    ) -> None:
        super().__init__(config)
        self.objectives = objectives or open_rewards(self.config.objectives, place="objectives")
        plain = [RewardConfig(**_of_reward(one)) for one in self.config.constraints]
        self.constraints = constraints or open_rewards(plain, place="constraints")

    @classmethod
    def of(
        cls, objectives: Sequence[Any], constraints: Sequence[tuple[Any, Mapping[str, float]]], *, floor: float = -1.0
    ) -> Self:
        """Return it for rewards in memory.

        Args:
            objectives: functions, `RewardFn`s, names, or pairs (reward, weight).
            constraints: pairs of such a reward and its bounds, `{"at_least": 0.5}`.
        """
        opened = open_rewards(list(objectives), place="objectives")
        held = open_rewards([reward for reward, _ in constraints], place="constraints")
        named = [{"name": name, "weight": weight} for name, weight in zip(opened.names, opened.weights, strict=True)]
        bounds = [{"name": name, **given} for name, (_, given) in zip(held.names, constraints, strict=True)]
        config = cls.Config.parse({"objectives": named, "constraints": bounds, "floor": floor})
        return cls(config, objectives=opened, constraints=held)

    def prepare(self) -> None:
        self.objectives.prepare()
        self.constraints.prepare()

    def describe(self) -> dict[str, Any]:
        """Return what each objective's and constraint's scores depend on."""
        return {"objectives": self.objectives.describe(), "constraints": self.constraints.describe()}

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return each sample's weighted sum of objectives, or the floor, with the parts."""
        if not samples:
            return []
        objectives = self.objectives.score(samples).by_name
        constraints = self.constraints.score(samples).by_name
        scores: list[float] = []
        for values, held in zip(
            zip(*objectives.values(), strict=True), zip(*constraints.values(), strict=True), strict=True
        ):
            kept = [rule.keeps(score) for rule, score in zip(self.config.constraints, held, strict=True)]
            parts: dict[str, float] = dict(zip(objectives, values, strict=True))
            parts |= {f"kept/{name}": float(one) for name, one in zip(constraints, kept, strict=True)}
            total = math.fsum(w * value for w, value in zip(self.objectives.weights, values, strict=True))
            scores.append(ScoreWithParts(self._bounded(total, all(kept)), parts | {"kept": float(all(kept))}))
        return scores

    def _bounded(self, total: float, kept: bool) -> float:
        """Return the floor where a constraint is violated, else the weighted sum, but at least the floor."""
        floor = self.config.floor
        if not kept:
            return floor
        if total < floor and not self._warned:
            self._warned = True
            log.warning(
                "a completion that keeps all constraints has objectives of %g, below the floor %g, which it gets: set a lower"
                " `floor` (reported once)",
                total,
                floor,
            )
        return max(total, floor)


def _of_reward(rule: ConstraintConfig) -> dict[str, Any]:
    """Return a constraint's options without its bounds."""
    given = rule.model_dump(exclude_unset=True)
    return {name: value for name, value in given.items() if name in RewardConfig.model_fields}
