"""Best of n: draw more completions than were asked for, and return those that a reward scores highest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from rlhf_core.plugin import (
    BaseConfig,
    Completion,
    Engine,
    Sampler,
    SamplingConfig,
    best_first,
    prompt_batch,
    samples_of,
)


class BestOfNConfig(BaseConfig):
    """Options of best of n."""

    draws: int = Field(
        4, ge=1, description="Completions drawn for each that is returned; larger finds better ones, slower."
    )
    generation: SamplingConfig = Field(default_factory=SamplingConfig, description="How completions are drawn.")


class BestOfNSampler(Sampler):
    """Returns the completions that a reward scores highest among several times as many."""

    api = 1
    Config = BestOfNConfig
    config: BestOfNConfig
    roles: ClassVar = {"policy": "policy", "reward": "reward"}

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return for each prompt the n best of `draws` times as many completions."""
        batch = prompt_batch(self.policy, prompts)
        drawn = Engine(self.policy, seed=seed).generate(batch, self.config.draws * n, self.config.generation)
        rows = [row for row, group in zip(batch.rows, drawn, strict=True) for _ in group]
        scores = self.models["reward"].score(samples_of(batch, drawn), rows)
        return best_first(drawn, scores.total.tolist(), n)
