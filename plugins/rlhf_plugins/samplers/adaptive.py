"""Adaptive allocation of one budget over many prompts (Damani et al. 2024, arXiv 2410.04707), without a trained predictor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rlhf_core.plugin import BaseConfig, Batch, Completion, Engine, Rewards, Sampler, prompt_batch, whole_count
from rlhf_plugins.samplers.budget_allocator import AdaptiveConfig, BudgetAllocator, Candidate
from rlhf_plugins.samplers.candidate_choice import answer_keys, best_candidates, candidate_rewards

log = logging.getLogger(__name__)


class _Candidates:
    """The candidates of each prompt of a batch, and their rewards where there is a reward."""

    def __init__(
        self,
        engine: Engine,
        batch: Batch,
        config: AdaptiveConfig,
        seeds: Sequence[Sequence[int]],
        reward: Rewards | None,
    ) -> None:
        self.engine, self.batch, self.config, self.seeds, self.reward = engine, batch, config, seeds, reward
        self.drawn: list[list[Completion]] = [[] for _ in seeds]
        self.rewards: list[list[float]] = [[] for _ in seeds]

    def draw(self, counts: Sequence[int]) -> list[list[Candidate]]:
        """Draw and score so many further candidates of each prompt; return what the allocation needs to know of them."""
        begins = [len(group) for group in self.drawn]
        numbers = [number for number, count in enumerate(counts) for _ in range(count)]
        seeds = [
            [seed] for own, begin, count in zip(self.seeds, begins, counts, strict=True) for seed in own[begin:][:count]
        ]
        new = self.engine.generate(self.batch.select(numbers), 1, self.config, seeds=seeds)
        for number, (one,) in zip(numbers, new, strict=True):
            self.drawn[number].append(one)
        groups = [group[begin:] for group, begin in zip(self.drawn, begins, strict=True)]
        if self.reward is not None:
            for known, scores in zip(self.rewards, candidate_rewards(self.reward, self.batch, groups), strict=True):
                known += scores
        return [
            [
                Candidate(key, len(one.ids), None if self.reward is None else known[begin + at])
                for at, (one, key) in enumerate(zip(group, answer_keys(group), strict=True))
            ]
            for group, known, begin in zip(groups, self.rewards, begins, strict=True)
        ]


class AdaptiveComputeAllocator(Sampler):
    """Adaptive allocation: spends one budget over all prompts where further completions are expected to help most."""

    api = 1
    Config = AdaptiveConfig
    config: AdaptiveConfig
    roles: ClassVar = {"policy": "policy", "reward": "reward"}
    shares_budget = True

    @classmethod
    def roles_for(cls, config: BaseConfig) -> Mapping[str, str]:
        """Return all roles; a majority needs no reward."""
        majority = isinstance(config, AdaptiveConfig) and config.choose == "majority"
        return {"policy": "policy"} if majority else cls.roles

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return the n best of each prompt's candidates, chosen as `best_of_n` chooses them.

        Raises:
            ConfigError: the budget doesn't cover n completions of each prompt, or a reward doesn't fit the options.
        """
        n = whole_count(n)
        batch, engine = prompt_batch(self.policy, prompts), self.engine(seed)
        seeds = engine.seeds(batch, max(self.config.max_candidates, n))
        # A prompt's seeds are made from its ids, so that of equal gains the same prompt comes first in any order of the prompts.
        allocator = BudgetAllocator(self.config, n, ties=[own[0] for own in seeds])
        candidates = _Candidates(engine, batch, self.config, seeds, self.models.get("reward"))
        allocator.run(candidates.draw)
        unit = self.config.budget_unit
        log.info("%d of %d %s are spent for %d prompts", allocator.spent, allocator.total, unit, batch.num_prompts)
        found = []
        for number, (group, got) in enumerate(zip(candidates.drawn, allocator.prompts, strict=True)):
            tokens = int(batch.prompt_lengths[number]) - 1 + sum(len(one.ids) for one in group)
            about = {"candidates": len(group), "tokens_forwarded": tokens, "rounds": got.rounds, **got.doubt}
            about |= {"expected_gain": got.expected_gain, "unspent": allocator.unspent}
            rewards = candidates.rewards[number] if "reward" in self.models else None
            found.append(best_candidates(group, rewards, n, self.config, about))
        return found
