"""Best of n: several candidates per prompt, of which a reward, a vote on their answers, or both choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from rlhf_core.plugin import BaseConfig, Batch, Completion, Sampler, is_decided, prompt_batch, whole_count
from rlhf_plugins.samplers.candidate_choice import (
    CandidateChoiceConfig,
    answer_keys,
    best_candidates,
    candidate_rewards,
)


class BestOfNConfig(CandidateChoiceConfig):
    """Options of best of n: those of every completion that is drawn, and how candidates are chosen."""

    candidates: int = Field(
        8,
        ge=1,
        description="Completions drawn per prompt, or n where that is more; larger finds better ones and costs more.",
    )
    round_size: int | None = Field(
        None,
        ge=1,
        description="Candidates drawn at once (majority); smaller ends a vote sooner once nothing can change it, and decodes"
        " fewer together. Null draws all at once.",
    )

    @model_validator(mode="after")
    def _options_are_used(self) -> BestOfNConfig:
        if self.round_size is not None and self.choose != "majority":
            raise ValueError(
                f"round_size has no meaning with choose {self.choose}; a majority alone can be decided early"
            )
        return self


class BestOfNSampler(Sampler):
    """Best of n: draws several candidates per prompt and returns those with the highest reward, or of the answer voted for."""

    api = 1
    Config = BestOfNConfig
    config: BestOfNConfig
    roles: ClassVar = {"policy": "policy", "reward": "reward"}

    @classmethod
    def roles_for(cls, config: BaseConfig) -> Mapping[str, str]:
        """Return all roles; a majority needs no reward."""
        majority = isinstance(config, BestOfNConfig) and config.choose == "majority"
        return {"policy": "policy"} if majority else cls.roles

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return the n best of each prompt's candidates.

        A completion's score is its reward, or by a vote its answer's share of the votes; of equal ones the one with the larger
        reward comes first, then the one that was drawn first.
        """
        n = whole_count(n)
        batch, most = prompt_batch(self.policy, prompts), max(self.config.candidates, n)
        drawn = (
            self._voted(batch, n, most, seed) if self.config.choose == "majority" else self._drawn(batch, most, seed)
        )
        reward = self.models.get("reward")
        rewards = [None] * len(drawn) if reward is None else candidate_rewards(reward, batch, drawn)
        found = []
        for number, group in enumerate(drawn):
            tokens = int(batch.prompt_lengths[number]) - 1 + sum(len(one.ids) for one in group)
            about = {"candidates": len(group), "tokens_forwarded": tokens}
            found.append(best_candidates(group, rewards[number], n, self.config, about))
        return found

    def _drawn(self, batch: Batch, most: int, seed: int | None) -> list[list[Completion]]:
        return self.engine(seed).generate(batch, most, self.config)

    def _voted(self, batch: Batch, n: int, most: int, seed: int | None) -> list[list[Completion]]:
        """Return each prompt's candidates, drawn in rounds until at least n are there and its vote is decided."""
        engine, size = self.engine(seed), self.config.round_size or most
        seeds = engine.seeds(batch, most)
        drawn: list[list[Completion]] = [[] for _ in range(batch.num_prompts)]
        open_ones, begin = list(range(batch.num_prompts)), 0
        while open_ones and begin < most:
            end = min(most, max(begin + size, n if begin == 0 else 0))
            some = [seeds[number][begin:end] for number in open_ones]
            new = engine.generate(batch.select(open_ones), end - begin, self.config, seeds=some)
            for number, completions in zip(open_ones, new, strict=True):
                drawn[number] += completions
            begin = end
            open_ones = [number for number in open_ones if not is_decided(answer_keys(drawn[number]), most - begin)]
        return drawn
