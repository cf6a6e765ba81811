"""Which of a prompt's candidates are returned: by their rewards, by a vote on their final answers, or by both."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import Batch, Completion, ConfigError, Rewards, SamplingConfig, answer_key, samples_of, tally


class CandidateChoiceConfig(SamplingConfig):
    """Options of a choice among candidates, and of every completion that is drawn for it."""

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

    @model_validator(mode="after")
    def _votes_have_weights(self) -> CandidateChoiceConfig:
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


def answer_keys(group: Sequence[Completion]) -> list[Hashable | None]:
    """Return each candidate's final answer as votes compare it; None where it has none, or was cut off."""
    return [answer_key(one.text, complete=not one.truncated) for one in group]


def candidate_rewards(reward: Rewards, batch: Batch, drawn: Sequence[Sequence[Completion]]) -> list[list[float]]:
    """Return the rewards of each prompt's candidates.

    Args:
        drawn: for each prompt of the batch, its candidates.
    """
    rows = [row for row, group in zip(batch.rows, drawn, strict=True) for _ in group]
    scores = iter(reward.score(samples_of(batch, drawn), rows).total.tolist())
    return [[next(scores) for _ in group] for group in drawn]


def best_candidates(
    group: Sequence[Completion],
    rewards: Sequence[float] | None,
    n: int,
    config: CandidateChoiceConfig,
    about: Mapping[str, Any],
) -> list[Completion]:
    """Return the n best candidates of a prompt, best first, with their scores.

    A score is the candidate's reward, or by a vote its answer's share of the votes; of equal ones the one with the larger reward
    comes first, then the one that was drawn first.

    Args:
        rewards: one per candidate; None for a majority.
        about: what is reported with each, besides its answer and reward.
    """
    if config.choose == "reward" and rewards is not None:
        order = sorted(range(len(group)), key=lambda at: -rewards[at])
        return [replace(group[at], score=rewards[at], details=about) for at in order[:n]]
    weights = None if rewards is None else vote_weights(rewards, config.vote_weight)
    own = [{} if rewards is None else {"reward": rewards[at]} for at in range(len(group))]
    details = [{**each, **about} for each in own]
    return best_by_votes(group, answer_keys(group), weights, n, ranks=rewards, details=details)


def best_by_votes(
    group: Sequence[Completion],
    keys: Sequence[Hashable | None],
    weights: Sequence[float] | None,
    n: int,
    *,
    ranks: Sequence[float] | None = None,
    details: Sequence[Mapping[str, Any]],
) -> list[Completion]:
    """Return the n best candidates of a prompt by a vote, best first; a score is the answer's share of the votes.

    Of two answers with equal votes the one that was given first comes first; of one answer's candidates the one with the larger
    rank, then the one that was drawn first.

    Args:
        keys: what candidates with equal answers share; None for one without a vote.
        weights: what each candidate's vote counts, at least 0; None: 1.
        ranks: one per candidate; None: all alike.
        details: what is reported with each, besides its answer.
    """
    votes = tally(keys, weights)
    cast = sum(votes.values())
    shares = [0.0 if key is None or not cast else votes[key] / cast for key in keys]
    best = {key: place for place, key in enumerate(votes)}  # which of two answers with equal votes was given first
    order = sorted(
        range(len(group)),
        key=lambda at: (
            -shares[at],
            len(best) if keys[at] is None else best[keys[at]],
            -(ranks[at] if ranks else 0.0),
            at,
        ),
    )
    return [
        replace(
            group[at],
            score=shares[at],
            details={"answer": None if keys[at] is None else str(keys[at]), **details[at]},
        )
        for at in order[:n]
    ]
