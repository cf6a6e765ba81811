"""Samplers to test the contract with: correct ones, and ones with one fault each."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.sampler_models import best_first
from rlhf_core.infra.seeds import completion_seeds
from rlhf_core.rewards import samples_of

Found = list[list[Completion]]


class PlainConfig(BaseConfig):
    """Options of plain sampling."""

    temperature: float = Field(0.8, ge=0, description="Divisor of the logits; larger draws more varied tokens.")


class Plain(Sampler):
    """Draws from the policy."""

    api = 1
    Config = PlainConfig
    config: PlainConfig

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        sampling = SamplingConfig(max_new_tokens=24, temperature=self.config.temperature)
        drawn = Engine(self.policy, seed=seed).generate(prompt_batch(self.policy, prompts), n, sampling)
        return [[self.changed(one) for one in group] for group in drawn]

    def changed(self, one: Completion) -> Completion:
        return one


class Ranked(Plain):
    """Draws twice as many completions as asked for, and returns those with the largest rewards."""

    api = 1
    roles: ClassVar = {"policy": "policy", "reward": "reward"}

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        drawn = super().sample(prompts, 2 * n, seed=seed)
        return best_first(drawn, self.scores(prompts, drawn), n)

    def scores(self, prompts: Sequence[Any], drawn: Found) -> list[float]:
        samples = samples_of(prompt_batch(self.policy, prompts), drawn)
        return self.models["reward"].score(samples).total.tolist()


class Fewer(Plain):
    """Returns three completions at most."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return [group[: min(n, 3)] for group in super().sample(prompts, n, seed=seed)]


class ManyByDefault(Plain):
    """Returns four completions by default."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 4, *, seed: int | None = None) -> Found:
        return super().sample(prompts, n, seed=seed)


class TextOnly(Plain):
    """Reads a chat as the text of its last message."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        texts = [prompt[-1]["content"] if isinstance(prompt, list) else prompt for prompt in prompts]
        return super().sample(texts, n, seed=seed)


class NoRows(Plain):
    """Converts a row of data to text instead of reading its prompt."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return super().sample([str(one) if isinstance(one, dict) else one for one in prompts], n, seed=seed)


class NoColumns(Ranked):
    """Passes prompts without the rows' other columns to the reward."""

    api = 1

    def scores(self, prompts: Sequence[Any], drawn: Found) -> list[float]:
        return super().scores([one["prompt"] if isinstance(one, dict) else one for one in prompts], drawn)


class WorstFirst(Ranked):
    """Returns the worst completion first."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return [group[::-1] for group in super().sample(prompts, n, seed=seed)]


class OneScored(Ranked):
    """Gives only the best completion a score."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        found = super().sample(prompts, n, seed=seed)
        return [[*group[:1], *(replace(one, score=None) for one in group[1:])] for group in found]


class RelativeScores(Ranked):
    """Scores a completion relative to the best of all prompts."""

    api = 1

    def scores(self, prompts: Sequence[Any], drawn: Found) -> list[float]:
        scores = super().scores(prompts, drawn)
        return [score - max(scores) for score in scores]


class NoLogprobs(Plain):
    """Returns completions without `logprobs`."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, logprobs=[])


class Positive(Plain):
    """Returns negative log-probabilities."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, logprobs=[-value for value in one.logprobs])


class UnknownEnd(Plain):
    """Gives an unknown stop reason."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, stop_reason="eos")


class LostEnd(Plain):
    """Removes the end token."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        if one.stop_reason != "end":
            return one
        return replace(
            one,
            ids=one.ids[:-1],
            logprobs=one.logprobs[:-1],
            raw_logprobs=one.raw_logprobs[:-1],
            kept_mass=one.kept_mass[:-1],
        )


class StrippedText(Plain):
    """Returns a text that differs from the ids."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, text=one.text[1:])


class TemperedAsRaw(Plain):
    """Returns `logprobs` as `raw_logprobs`."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, raw_logprobs=one.logprobs)


class RawAsDrawn(Plain):
    """Returns `raw_logprobs` as `logprobs`."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, logprobs=one.raw_logprobs)


class Seedless(Plain):
    """Ignores the seed."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return super().sample(prompts, n)


class OneSeed(Plain):
    """Always uses the same seed."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return super().sample(prompts, n, seed=3)


class ZeroByDefault(Plain):
    """Uses the seed 0 where none is given."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return super().sample(prompts, n, seed=seed or 0)


class SeedByPlace(Plain):
    """Derives a prompt's seed from its position in the list."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        batch, sampling = (
            prompt_batch(self.policy, prompts),
            SamplingConfig(max_new_tokens=24, temperature=self.config.temperature),
        )
        seed = random.randrange(2**60) if seed is None else seed
        seeds = completion_seeds(seed, "place", rows=range(len(prompts)), n=n)
        return Engine(self.policy).generate(batch, n, sampling, seeds=seeds)


class BudgetByPlace(SeedByPlace):
    """Divides what prompts share by their positions in the list."""

    api = 1
    shares_budget = True


class LeftInEvaluation(Plain):
    """Leaves the policy in evaluation mode."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        self.policy.eval()
        return super().sample(prompts, n, seed=seed)


class ConfiguredConfig(BaseConfig):
    """Options of sampling as it is configured."""

    generation: SamplingConfig = Field(default_factory=SamplingConfig, description="How completions are drawn.")


class Configured(Sampler):
    """Draws from the policy as it is configured."""

    api = 1
    Config = ConfiguredConfig
    config: ConfiguredConfig

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        drawn = Engine(self.policy, seed=seed).generate(prompt_batch(self.policy, prompts), n, self.sampling())
        return [[self.changed(one) for one in group] for group in drawn]

    def sampling(self) -> SamplingConfig:
        return self.config.generation

    def changed(self, one: Completion) -> Completion:
        return one


class FixedOptions(Configured):
    """Ignores its sampling options."""

    api = 1

    def sampling(self) -> SamplingConfig:
        return SamplingConfig(max_new_tokens=24)


class SilentlyCut(Configured):
    """Returns completions without `kept_mass`."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, kept_mass=[])


class CutAsDrawn(Configured):
    """Returns log-probabilities without truncation as `logprobs`."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, logprobs=[a + math.log(m) for a, m in zip(one.logprobs, one.kept_mass, strict=True)])


class OtherMass(Configured):
    """Returns a `kept_mass` that is none, and log-probabilities that agree with it."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        logprobs = [a - math.log(m) for a, m in zip(one.logprobs, one.kept_mass, strict=True)]
        return replace(one, kept_mass=[mass**2 for mass in one.kept_mass], logprobs=logprobs)


class ShortMask(Plain):
    """Returns a mask for all tokens but the last."""

    api = 1

    def changed(self, one: Completion) -> Completion:
        return replace(one, mask=[True] * (len(one.ids) - 1))


class TakesPrompts(Plain):
    """Removes the prompts from the caller's rows."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return super().sample([one.pop("prompt") if "prompt" in one else one for one in prompts], n, seed=seed)


class SeedsTheWorld(Plain):
    """Seeds torch's global random state."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        if seed is not None:
            torch.manual_seed(seed)
        return super().sample(prompts, n)


class AtMostEight(Plain):
    """Returns eight completions at most."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return super().sample(prompts, min(n, 8), seed=seed)


class KeepsTheLeast(Ranked):
    """Prefers smaller rewards."""

    api = 1

    def scores(self, prompts: Sequence[Any], drawn: Found) -> list[float]:
        return [-score for score in super().scores(prompts, drawn)]


class ScoresOfTheNext(Ranked):
    """Gives each completion the score of another one."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return [
            best_first([group], [one.score for one in (group[-1], *group[:-1])], n)[0]
            for group in super().sample(prompts, n, seed=seed)
        ]


class CopiesTheFirst(Plain):
    """Returns the first completion n times."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> Found:
        return [group[:1] * n for group in super().sample(prompts, n, seed=seed)]


class IdleConfig(PlainConfig):
    """Options of plain sampling, and one too many."""

    draws: int = Field(2, ge=1, description="Completions drawn for each that is returned; larger finds better ones.")


class IdleOption(Plain):
    """Accepts an option and ignores it."""

    api = 1
    Config = IdleConfig
