"""Options that methods share which learn from what the policy generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.sampling_options import SamplingConfig
from rlhf_core.config.training import TrainerConfig


class RewardConfig(BaseConfig):
    """One reward of a run. A plain name means `{name: …}`."""

    alone = "name"

    name: str = Field(
        min_length=1,
        description="A reward's name, as `rlhf list rewards` shows it, or a function as `package.module:function`.",
    )
    weight: float = Field(
        1.0, allow_inf_nan=False, description="Factor of its scores in the sum; larger gives it more influence."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Its own options, as `rlhf show NAME` lists them."
    )
    time_limit: float | None = Field(
        600.0,
        gt=0,
        description="Seconds that one call of the reward may take before the run stops; larger allows slower rewards, null any.",
    )
    runs_in: Literal["auto", "main", "thread", "process"] = Field(
        "auto",
        description="Where it runs: `main`, in the main thread after generation; `thread`, beside generation, for one that waits;"
        " `process`, beside it in child processes, for one that computes long, hangs or crashes; `auto` as the reward declares.",
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="Most calls of it at once, outside the main thread; larger is faster for one that waits. Null: what"
        " the reward declares, else 1 thread or process, and 32 calls of an async one.",
    )


class SamplerConfig(BaseConfig):
    """A sampler that draws in a run. A plain name means `{name: …}`."""

    alone = "name"

    name: str = Field(min_length=1, description="A sampler's name, as `rlhf list samplers` shows it.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Its own options, as `rlhf show NAME` lists them."
    )
    roles: dict[str, Any] = Field(
        default_factory=dict,
        description="Its models besides the policy, which is the run's, by role: a reward's name, a list of rewards, or the path"
        " of a model that rewards; of a role that generates, such as `draft`, a model's path or `{path: …}`, or a list of these"
        " where it takes several models.",
    )


class OnlineConfig(TrainerConfig):
    """Options of a method that learns from what its policy generates."""

    needs_rewards: ClassVar[bool] = True
    """Whether the method needs rewards; False for one that learns from something else, such as a teacher."""

    rewards: list[RewardConfig] = Field(
        default_factory=list,
        description="Rewards whose weighted sum is maximised: names, or `{name: …, weight: …, options: {…}}`; more of them are"
        " added up. From Python they may be given to the trainer instead.",
    )
    generation: SamplingConfig = Field(default_factory=SamplingConfig, description="How completions are drawn.")
    rollout_sampler: SamplerConfig | None = Field(
        None,
        description="Sampler that draws rollouts, as `generation` says: a name, or `{name: …, options: {…}, roles: {…}}`. Its"
        " role `reward` is the run's rewards where it is left out. What it chooses isn't distributed as the policy's completions"
        " are: training on it is rejection sampling. Null takes every completion that the policy draws.",
    )
    group_size: int = Field(
        8,
        ge=1,
        description="Completions per prompt; larger estimates a prompt's mean reward better and costs more.",
    )
    rollout_epochs: int = Field(
        1,
        ge=1,
        description="Passes over each rollout; larger learns more from it, further from the policy that sampled it.",
    )
    minibatches: int = Field(
        1,
        ge=1,
        description="Optimiser steps per pass over a rollout; larger makes smaller steps on older samples.",
    )

    eval_samples: int = Field(
        1, ge=1, description="Completions of each held-out prompt; larger measures it better, and gives pass@k."
    )
    eval_temperature: float | None = Field(
        None,
        ge=0,
        description="Temperature of held-out completions; larger draws more varied ones, 0 the most likely one. Null takes 0 for"
        " one completion, and that of `generation` for several, or for an `eval_sampler`.",
    )
    eval_sampler: SamplerConfig | None = Field(
        None,
        description="Sampler that completes held-out prompts, as `generation` says unless its options say otherwise: a name, or"
        " `{name: …, options: {…}, roles: {…}}`. Null draws from the policy alone.",
    )
    max_logprob_gap: float | None = Field(
        None,
        gt=0,
        description="Most nats per token by which the engine's log-probabilities may differ from the trainer's, on average"
        " before the first update; larger allows ratios that are further off. Null takes 0.001 in float32, 0.25 in bf16 and 0.1"
        " in fp16.",
    )
    replay: str | None = Field(
        None,
        min_length=1,
        description="Directory of a run with `logging.rollouts.whole`, whose rollouts are taken instead of drawing others: under"
        " the same options every update is the same, under others (a loss, a learning rate) it shows what they change. Null draws"
        " them.",
    )
    kl_budget: float | None = Field(
        None,
        gt=0,
        description="End the run once the running mean of the policy's KL to the reference (the metric `kl_mean`, nats per token,"
        " in which a step counts a tenth) is above it; larger lets the policy go further, null sets no end. Needs a method that"
        " reports its KL.",
    )
    right_from: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Least reward of a completion that counts as right, for pass@k and the lengths of right and wrong ones;"
        " larger is stricter. Null takes half of the sum of the positive weights.",
    )

    @model_validator(mode="after")
    def _several_completions_are_drawn(self) -> OnlineConfig:
        if self.eval_samples > 1 and self.evaluated_temperature == 0:
            raise ValueError("eval_samples: completions of temperature 0 are all alike: set `eval_temperature` above 0")
        return self

    @property
    def evaluated_temperature(self) -> float:
        """The temperature of held-out completions."""
        if self.eval_temperature is not None:
            return self.eval_temperature
        several = self.eval_samples > 1 or self.eval_sampler is not None
        return self.generation.temperature if several else 0.0

    @property
    def evaluated_sampling(self) -> SamplingConfig:
        """How held-out completions are drawn."""
        return self.generation.model_copy(update={"temperature": self.evaluated_temperature})

    def about_chosen_completions(self) -> str | None:
        """Return what the user is warned of where a `rollout_sampler` chooses among the policy's completions; None for nothing.

        A method overrides it whose updates take completions for draws of the policy.

        Raises:
            ConfigError: the method would be wrong on chosen completions.
        """
        return None

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_reward_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Mapping | RewardConfig) else value


def right_threshold(asked: float | None, weights: Sequence[float]) -> float:
    """Return the reward from which a completion counts as right: the one asked for, else half the sum of positive weights.

    For rewards between 0 and 1 that is half of what a completion can get.
    """
    return asked if asked is not None else sum(weight for weight in weights if weight > 0) / 2
