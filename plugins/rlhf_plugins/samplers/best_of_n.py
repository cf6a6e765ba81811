"""Best of n: several candidates per prompt, of which a reward, a vote on their answers, or both choose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import (
    BaseConfig,
    Batch,
    Completion,
    ConfigError,
    Sampler,
    SamplingConfig,
    answer_key,
    is_decided,
    prompt_batch,
    samples_of,
    tally,
    whole_count,
)


class BestOfNConfig(SamplingConfig):
    """Options of best of n: those of every completion that is drawn, and how candidates are chosen."""

    candidates: int = Field(
        8,
        ge=1,
        description="Completions drawn per prompt, or n where that is more; larger finds better ones and costs more.",
    )
    choose: Literal["reward", "weighted", "majority"] = Field(
        "reward",
        description="What decides: `reward`, each candidate's own; `weighted`, the rewards of all candidates with the same final"
        " answer, added up; `majority`, how many have the same final answer (self-consistency), which needs no reward.",
    )
    vote_weight: Literal["reward", "sigmoid"] = Field(
        "reward",
        description="What a vote counts (weighted): the candidate's `reward`, which must be at least 0, or its `sigmoid`, for"
        " rewards that are log-odds, such as a reward model's.",
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
        if self.vote_weight != "reward" and self.choose != "weighted":
            raise ValueError(f"vote_weight has no meaning with choose {self.choose}; it belongs to weighted")
        return self


def vote_weights(rewards: Sequence[float], kind: str) -> list[float]:
    """Return what the votes of candidates with these rewards count, each at least 0.

    Raises:
        ConfigError: a reward below 0 would be a vote against its answer.
    """
    if kind == "sigmoid":
        return [1 / (1 + math.exp(-reward)) if reward > -700 else 0.0 for reward in rewards]
    if (least := min(rewards, default=0.0)) < 0:
        raise ConfigError(
            "a weighted vote needs rewards of at least 0", place="choose", got=f"{least:g}",
            fix="`vote_weight: sigmoid` for rewards that are log-odds, or `choose: reward`",
        )  # fmt: skip
    return list(rewards)


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
        rewards = self._rewards(batch, drawn)
        found = []
        for number, group in enumerate(drawn):
            tokens = int(batch.prompt_lengths[number]) - 1 + sum(len(one.ids) for one in group)
            found.append(self._best(group, rewards[number], n, {"candidates": len(group), "tokens_forwarded": tokens}))
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
            open_ones = [number for number in open_ones if not is_decided(_keys(drawn[number]), most - begin)]
        return drawn

    def _rewards(self, batch: Batch, drawn: Sequence[Sequence[Completion]]) -> list[list[float] | None]:
        """Return the rewards of each prompt's candidates; None for a majority."""
        if "reward" not in self.models:
            return [None] * len(drawn)
        rows = [row for row, group in zip(batch.rows, drawn, strict=True) for _ in group]
        scores = iter(self.models["reward"].score(samples_of(batch, drawn), rows).total.tolist())
        return [[next(scores) for _ in group] for group in drawn]

    def _best(
        self, group: Sequence[Completion], rewards: Sequence[float] | None, n: int, about: Mapping[str, Any]
    ) -> list[Completion]:
        """Return the n best candidates of a prompt, best first, with their scores; `about` is what is reported with each."""
        if self.config.choose == "reward" and rewards is not None:
            order = sorted(range(len(group)), key=lambda at: -rewards[at])
            return [replace(group[at], score=rewards[at], details=about) for at in order[:n]]
        keys = _keys(group)
        votes = tally(keys, None if rewards is None else vote_weights(rewards, self.config.vote_weight))
        cast = sum(votes.values())
        shares = [0.0 if key is None or not cast else votes[key] / cast for key in keys]
        best = {key: place for place, key in enumerate(votes)}  # which of two answers with equal votes was given first
        order = sorted(
            range(len(group)),
            key=lambda at: (-shares[at], best.get(keys[at], len(best)), -(rewards[at] if rewards else 0.0), at),
        )
        found = []
        for at in order[:n]:
            own = {} if rewards is None else {"reward": rewards[at]}
            key = keys[at]
            answer = None if key is None else str(key)
            found.append(replace(group[at], score=shares[at], details={"answer": answer, **own, **about}))
        return found


def _keys(group: Sequence[Completion]) -> list[Any]:
    """Return each candidate's final answer as votes compare it."""
    return [answer_key(one.text, complete=one.stop_reason != "length") for one in group]
