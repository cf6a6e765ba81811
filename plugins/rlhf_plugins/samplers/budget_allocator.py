"""How a budget over many prompts is spent: candidates in rounds, where further ones are expected to help most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import ConfigError, tally
from rlhf_plugins.samplers.candidate_choice import CandidateChoiceConfig, vote_weights
from rlhf_plugins.samplers.expected_gains import RewardGains, best_rate, pooled_variance, vote_gains


class AdaptiveConfig(CandidateChoiceConfig):
    """Options of adaptive allocation: those of every completion, how candidates are chosen, and the budget for drawing them."""

    budget: float = Field(
        8.0,
        gt=0,
        allow_inf_nan=False,
        description="What may be drawn per prompt, on average over the prompts that are answered together: each may get more or"
        " less, all of them never more. Larger finds better completions and costs more.",
    )
    budget_unit: Literal["completions", "tokens"] = Field(
        "completions",
        description="What the budget counts: `completions`, or the `tokens` drawn for them (prompts don't count). A completion is"
        " only begun where `max_new_tokens` of the budget are left for it, so up to that many tokens may stay unspent.",
    )
    first_round: int = Field(
        3,
        ge=1,
        description="Completions that each prompt gets first, or n where that is more, to estimate its difficulty; larger"
        " estimates it better, and leaves less to allocate.",
    )
    rounds: int = Field(
        4,
        ge=1,
        description="Rounds in which the rest is allocated, more where tokens are left over; larger decides each on more"
        " knowledge, and decodes fewer completions together.",
    )
    max_candidates: int = Field(
        64,
        ge=1,
        description="Most completions of one prompt, or n where that is more; larger lets hard prompts take more of the budget.",
    )
    min_gain: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Prompts get nothing further whose expected gain of one more completion isn't above it: how much likelier a"
        " vote's winner becomes to be right, or how much better the best reward. Larger leaves more of the budget unspent.",
    )
    reward_ceiling: float | None = Field(
        None,
        allow_inf_nan=False,
        description="The largest reward that there is, such as 1 of a verifier (choose: reward); prompts that have it get nothing"
        " further, so smaller stops sooner. Null takes the largest one drawn, where several prompts have it and others less, else"
        " knows none.",
    )

    @model_validator(mode="after")
    def _budget_fits(self) -> AdaptiveConfig:
        least = 2 if self.choose == "reward" else 1
        if self.first_round < least:
            raise ValueError("first_round: the spread of rewards needs at least 2 completions of each prompt")
        if (need := self.cost_of(self.first_round)) > self.budget:
            raise ValueError(
                f"budget: {self.budget:g} {self.budget_unit} per prompt don't cover the first round, in which every prompt gets"
                f" {self.first_round} completion{'s' * (self.first_round > 1)}: at least {need}{self._per_completion()}"
            )
        if self.max_candidates < self.first_round:
            raise ValueError("max_candidates: at least the completions of the first round")
        if self.budget_unit == "completions" and self.max_candidates < self.budget:
            raise ValueError(f"max_candidates: with {self.max_candidates} per prompt the budget could never be spent")
        if self.reward_ceiling is not None and self.choose != "reward":
            raise ValueError(f"reward_ceiling has no meaning with choose {self.choose}; it belongs to reward")
        return self

    def cost_of(self, completions: int) -> int:
        """Return the most that so many completions may cost, in the unit of the budget."""
        return completions * (self.max_new_tokens if self.budget_unit == "tokens" else 1)

    def _per_completion(self) -> str:
        return f", {self.max_new_tokens} (`max_new_tokens`) for each" if self.budget_unit == "tokens" else ""


@dataclass(frozen=True)
class Candidate:
    """What is known of a completion that was drawn."""

    answer: Hashable | None
    """Its `answer_key`."""
    tokens: int
    reward: float | None = None


Draw = Callable[[Sequence[int]], Sequence[Sequence[Candidate]]]
"""Draws so many further completions of each prompt, and returns them, prompt by prompt."""


@dataclass
class PromptAllocation:
    """What a prompt got of the budget."""

    candidates: list[Candidate] = field(default_factory=list)
    rounds: int = 0
    """In how many rounds it got completions."""
    doubt: Mapping[str, float] = field(default_factory=dict)
    """How hard it seemed after the first round: `disagreement` and `entropy` of answers, or `reward_spread`."""
    expected_gain: float = 0.0
    """Of one more completion, when the allocation ended."""


def allot(
    gains: Sequence[Callable[[int], float]],
    costs: Sequence[float],
    rooms: Sequence[int],
    ties: Sequence[int],
    *,
    share: float,
    most: int,
    min_gain: float = 0.0,
) -> list[int]:
    """Return how many further completions each prompt gets in a round: one by one where the gain per cost is largest.

    That is the greedy allocation of Damani et al. 2024 (arXiv 2410.04707, section 3), best where gains are concave.

    Args:
        gains: for each prompt, the expected gain of a completion after so many others of this round.
        costs: for each prompt, what a completion is expected to cost.
        rooms: for each prompt, most further completions.
        ties: different numbers, one per prompt; of equal gains the one with the smaller number comes first.
        share: what the round should cost; the last completion may exceed it.
        most: completions in all.
        min_gain: gains that aren't above it count as none.
    """
    counts, spent = [0] * len(gains), 0.0
    waiting: list[tuple[float, int, int]] = []

    def push(prompt: int) -> None:
        gain = gains[prompt](counts[prompt]) if counts[prompt] < rooms[prompt] else 0.0
        if gain > min_gain:
            heapq.heappush(waiting, (-gain / costs[prompt], ties[prompt], prompt))

    for prompt in range(len(gains)):
        push(prompt)
    while waiting and spent < share and sum(counts) < most:
        prompt = heapq.heappop(waiting)[2]
        counts[prompt] += 1
        spent += costs[prompt]
        push(prompt)
    return counts


class BudgetAllocator:
    """Draws candidates of several prompts in rounds, for one budget.

    Args:
        config: budget, rounds, and what chooses among candidates.
        n: completions that each prompt needs.
        ties: different numbers, one per prompt, which don't depend on the prompts' order.

    Raises:
        ConfigError: the budget doesn't cover n completions of each prompt.
    """

    def __init__(self, config: AdaptiveConfig, n: int, ties: Sequence[int]) -> None:
        if (need := config.cost_of(n)) > config.budget:
            raise ConfigError(
                f"the budget doesn't cover n = {n} completions of each prompt", place="budget",
                got=f"{config.budget:g} {config.budget_unit} per prompt", fix=f"at least {need}, or a smaller n",
            )  # fmt: skip
        self.config, self.n, self.ties = config, n, ties
        self.total = math.floor(config.budget * len(ties))
        """The whole budget."""
        self.spent = 0
        self.prompts = [PromptAllocation() for _ in ties]

    @property
    def unspent(self) -> int:
        return self.total - self.spent

    @property
    def most(self) -> int:
        """Most completions of one prompt."""
        return max(self.config.max_candidates, self.n)

    def run(self, draw: Draw) -> None:
        """Draw until the budget is spent, or nothing more is expected to help."""
        if not self.prompts:
            return
        self._draw(draw, [max(self.config.first_round, self.n)] * len(self.prompts))
        for one in self.prompts:
            one.doubt = self._doubt(one.candidates)
        rounds = self.config.rounds
        while any(counts := self._plan(self.unspent / rounds)):
            self._draw(draw, counts)
            rounds = max(1, rounds - 1)
        for one, gain in zip(self.prompts, self._gains(), strict=True):
            one.expected_gain = gain(0)

    def _draw(self, draw: Draw, counts: Sequence[int]) -> None:
        for one, new in zip(self.prompts, draw(counts), strict=True):
            one.candidates += new
            one.rounds += bool(new)
            self.spent += sum(each.tokens for each in new) if self.config.budget_unit == "tokens" else len(new)

    def _plan(self, share: float) -> list[int]:
        """Return how many further completions each prompt gets in a round that should cost `share`."""
        return allot(
            self._gains(),
            [self._cost(one) for one in self.prompts],
            [self.most - len(one.candidates) for one in self.prompts],
            self.ties,
            share=share,
            most=self.unspent // self.config.cost_of(1),
            min_gain=self.config.min_gain,
        )

    def _cost(self, one: PromptAllocation) -> float:
        """Return what a further completion of a prompt is expected to cost."""
        if self.config.budget_unit == "completions":
            return 1.0
        return max(1.0, sum(each.tokens for each in one.candidates) / len(one.candidates))

    def _gains(self) -> list[Callable[[int], float]]:
        """Return each prompt's expected gain of a completion after so many others that aren't drawn yet."""
        return (
            self._reward_gains() if self.config.choose == "reward" else [self._vote_gain(one) for one in self.prompts]
        )

    def _vote_gain(self, one: PromptAllocation) -> Callable[[int], float]:
        lead, rival, others = self._votes(one)
        left = min(self.most - len(one.candidates), int(self.unspent / self._cost(one)))
        return lambda drawn: best_rate(vote_gains(lead, rival, others), drawn, left)

    def _votes(self, one: PromptAllocation) -> tuple[int, int, int]:
        """Return the votes for the leading answer and the second one, and the number of all other candidates.

        A weighted vote counts as the nearest number of candidates with the largest weight.
        """
        weights = None
        if self.config.choose == "weighted":
            weights = vote_weights([each.reward or 0.0 for each in one.candidates], self.config.vote_weight)
        largest = max(weights or [1.0]) or 1.0
        votes = tally([each.answer for each in one.candidates], weights).values()
        lead, rival = sorted([0, 0, *(round(vote / largest) for vote in votes)])[:-3:-1]
        return lead, rival, max(0, len(one.candidates) - lead - rival)

    def _reward_gains(self) -> list[Callable[[int], float]]:
        groups = [[each.reward or 0.0 for each in one.candidates] for one in self.prompts]
        # Without any spread within prompts, that between them stands for it; without any at all, all are equally promising.
        pooled = pooled_variance(groups) or pooled_variance([[each for group in groups for each in group]]) or 1.0
        ceiling = self._ceiling(groups)
        bests = [sorted(group)[-self.n] for group in groups]
        return [
            RewardGains(group, pooled, best=best, ceiling=ceiling) for group, best in zip(groups, bests, strict=True)
        ]

    def _ceiling(self, groups: Sequence[Sequence[float]]) -> float:
        """Return the largest reward that there can be, infinity where none is known.

        Raises:
            ConfigError: a reward is above the one that the options state.
        """
        largest, least = max(map(max, groups)), min(map(min, groups))
        if self.config.reward_ceiling is None:
            return largest if largest > least and sum(largest in group for group in groups) > 1 else math.inf
        if largest > self.config.reward_ceiling:
            raise ConfigError(
                "a reward is above the largest that there is", place="reward_ceiling",
                got=f"{largest:g}, with reward_ceiling {self.config.reward_ceiling:g}", fix="set a larger one, or leave it out",
            )  # fmt: skip
        return self.config.reward_ceiling

    def _doubt(self, candidates: Sequence[Candidate]) -> Mapping[str, float]:
        """Return how hard a prompt seems by its first candidates. One without an answer disagrees with all others."""
        count = len(candidates)
        if self.config.choose == "reward":
            return {"reward_spread": math.sqrt(pooled_variance([[each.reward or 0.0 for each in candidates]]))}
        votes = tally([each.answer for each in candidates]).values()
        shares = [vote / count for vote in votes] + [1 / count] * (count - round(sum(votes)))
        entropy = math.fsum(share * math.log(1 / share) for share in shares)
        return {"disagreement": 1 - max(votes, default=0.0) / count, "entropy": entropy}
