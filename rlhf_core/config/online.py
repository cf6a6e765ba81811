"""Options that methods share which learn from what the policy generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.training import TrainerConfig


class SamplingConfig(BaseConfig):
    """How completions are drawn: repetition penalty, then temperature, top-k, top-p and min-p, in transformers' order."""

    max_new_tokens: int = Field(
        256, ge=1, description="Most tokens in a completion, its end token included; larger allows longer answers."
    )
    temperature: float = Field(
        1.0, ge=0, description="Divisor of the logits; larger draws more varied tokens, 0 always the most likely one."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw among the most likely tokens whose probabilities add up to it; smaller draws fewer different tokens.",
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Draw among this many of the most likely tokens; larger draws more different ones, 0 draws among all.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Draw among the tokens that are at least this share as likely as the most likely one, after temperature;"
        " larger draws fewer different tokens, 0 draws among all.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description="Divisor of the positive logits, and factor of the negative ones, of tokens that the prompt or the"
        " completion already holds; larger repeats less, below 1 repeats more.",
    )
    min_new_tokens: int = Field(
        0,
        ge=0,
        description="Tokens that a completion has before it may end with an end token, a stop id or a stop string;"
        " larger makes longer answers.",
    )
    stop: list[str] = Field(
        default_factory=list,
        description="Texts that end a completion where they appear in it, and that its text is without; more of them end it"
        " earlier. A plain text is a list of one.",
    )
    stop_ids: list[int] = Field(
        default_factory=list,
        description="Token ids that end a completion besides its end tokens, and that its text is without; more of them end"
        " it earlier. A plain number is a list of one.",
    )

    @field_validator("stop", "stop_ids", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value

    @field_validator("stop")
    @classmethod
    def _stop_is_text(cls, stop: list[str]) -> list[str]:
        for text in stop:
            if not text:
                raise ValueError("an empty text is in every completion: leave it out")
            if "\ufffd" in text:
                raise ValueError("U+FFFD stands for bytes that aren't text, as half a character: leave it out")
        return stop

    @field_validator("stop_ids", mode="before")
    @classmethod
    def _stop_ids_are_ids(cls, stop_ids: Any) -> Any:
        for token in stop_ids if isinstance(stop_ids, list) else []:
            if isinstance(token, bool) or (isinstance(token, int) and token < 0):
                raise ValueError("token ids are whole numbers, 0 or larger")
        return stop_ids

    @model_validator(mode="after")
    def _room_for_the_least(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"`min_new_tokens` ({self.min_new_tokens}) is above `max_new_tokens` ({self.max_new_tokens}): lower the first or"
                " raise the second"
            )
        return self


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
        description="Seconds that scoring one batch may take before the run stops; larger allows slower rewards, null any.",
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

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_reward_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Mapping | RewardConfig) else value
