"""Several models answer as one: by averaging their distributions at each token, or by a vote on their final answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.plugin import (
    BaseConfig,
    Completion,
    EnsembleBackend,
    PolicyModel,
    Sampler,
    SamplingConfig,
    checked_weights,
    prompt_batch,
    whole_count,
)
from rlhf_plugins.samplers.candidate_choice import answer_keys, best_by_votes

CANDIDATES = 4
"""Completions of each model in a vote, unless the options say otherwise."""


class EnsemblePolicyConfig(SamplingConfig):
    """Options of an ensemble: those of every completion that is drawn, and how its models are combined."""

    combine: Literal["logits", "probabilities", "vote"] = Field(
        "logits",
        description="How the models answer as one: each token is drawn from the weighted mean of their `logits` (geometric mean"
        " of their distributions: a token that one of them finds unlikely stays unlikely), or of their `probabilities` (a token"
        " that one of them finds likely may come), which need one vocabulary; or by a `vote` on the final answers of whole"
        " completions, drawn from each model by itself.",
    )
    weights: list[float] | None = Field(
        None,
        description="Weight of each model, the policy's first; a larger share counts more, a model of weight 0 isn't run. Null"
        " weighs all alike.",
    )
    candidates: int | None = Field(
        None,
        ge=1,
        description="Completions drawn from each model (vote), more where fewer than n would be drawn in all; larger decides more"
        f" reliably and costs more. Null draws {CANDIDATES}.",
    )

    @field_validator("weights")
    @classmethod
    def _weights_can_be_shares(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (any(weight < 0 for weight in value) or not any(value)):
            raise ValueError("must be at least 0 each, and not all 0")
        return value

    @model_validator(mode="after")
    def _options_are_used(self) -> EnsemblePolicyConfig:
        if self.candidates is not None and self.combine != "vote":
            raise ValueError(
                f"candidates has no meaning with combine {self.combine}, which draws n completions; it belongs to vote"
            )
        if self.draft is not None and self.combine != "vote":
            raise ValueError(f"draft has no meaning with combine {self.combine}: no guesses are verified; leave it out")
        return self


class EnsemblePolicy(Sampler):
    """Several models answer as one, by the mean of their logits or probabilities at each token, or by a vote on final answers."""

    api = 1
    Config = EnsemblePolicyConfig
    config: EnsemblePolicyConfig
    roles: ClassVar = {"policy": "policy", "members": "policies"}
    draws_from_policy = False

    def __init__(self, config: BaseConfig | None = None, **models: Any) -> None:
        """Take a configuration, the first model as `policy`, and the others as `members`.

        Raises:
            ConfigError: no members, another number of weights than of models, the same model twice, or models on different
                devices.
            ModelError: to be combined at each token, a member has another vocabulary.
        """
        super().__init__(config, **models)
        self._shares = checked_weights(self.config.weights, len(self._policies))
        if self.config.combine != "vote":
            _ = self._backend  # which refuses models that don't suit each other

    @property
    def _policies(self) -> tuple[PolicyModel, ...]:
        return (self.policy, *self.models["members"])

    @cached_property
    def _backend(self) -> EnsembleBackend:
        """What draws from all models together; it keeps prompts between calls."""

        def count(number: int, tokens: int) -> None:
            if number:  # the policy's are counted by its engine
                self.forwarded["members"] = self.forwarded.get("members", 0) + tokens

        assert self.config.combine != "vote"
        return EnsembleBackend(self._policies, self.config.weights, self.config.combine, counted=count)

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return n completions for each prompt.

        Combined at each token, they come in the order in which they were drawn, without scores. By a vote, those with the answer
        of most votes come first; a completion's score is its answer's share of the weighted votes.
        """
        n = whole_count(n)
        if self.config.combine == "vote":
            return self._voted(prompts, n, seed)
        batch = prompt_batch(self.policy, prompts)
        drawn = self.engine(seed, backend=self._backend).generate(batch, n, self.config)
        running = sum(share > 0 for share in self._shares)
        found = []
        for length, group in zip(batch.prompt_lengths.tolist(), drawn, strict=True):
            about = {"tokens_forwarded": running * (length - 1 + sum(len(one.ids) for one in group))}
            found.append([replace(one, details={**one.details, **about}) for one in group])
        return found

    def _voted(self, prompts: Sequence[Any], n: int, seed: int | None) -> list[list[Completion]]:
        """Return the n completions of each prompt that a vote puts first."""
        voting = [number for number, share in enumerate(self._shares) if share > 0]
        each = max(self.config.candidates or CANDIDATES, -(-n // len(voting)))
        groups: list[list[Completion]] = [[] for _ in prompts]
        forwarded = [0] * len(prompts)
        for place, number in enumerate(voting):
            batch = prompt_batch(self._policies[number], prompts)
            engine = self.engine(seed, f"members[{number - 1}]" if number else "policy")
            # Of one stream of seeds each model has its own part: models that are alike draw different completions.
            seeds = [own[place * each :] for own in engine.seeds(batch, (place + 1) * each)]
            drawn = engine.generate(batch, each, self.config, seeds=seeds)
            for at, (length, new) in enumerate(zip(batch.prompt_lengths.tolist(), drawn, strict=True)):
                groups[at] += new
                forwarded[at] += length - 1 + sum(len(one.ids) for one in new)
        members = [number for number in voting for _ in range(each)]
        weights = [self._shares[number] for number in members]
        found = []
        for group, tokens in zip(groups, forwarded, strict=True):
            about = {"candidates": len(group), "tokens_forwarded": tokens}
            details = [{**one.details, "member": number, **about} for one, number in zip(group, members, strict=True)]
            found.append(best_by_votes(group, answer_keys(group), weights, n, ranks=weights, details=details))
        return found
