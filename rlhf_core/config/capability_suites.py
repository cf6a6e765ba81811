"""Suites of capability tests as a file or a recipe holds them. Importing this imports no torch."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.online import RewardConfig
from rlhf_core.config.sampling_options import SamplingConfig


class CapabilitySamplingConfig(SamplingConfig):
    """How a tested policy's completions are drawn: as elsewhere, but by default always the most likely token."""

    temperature: float = Field(
        0.0,
        ge=0,
        description="Divisor of the logits; larger draws more varied tokens, 0 always the most likely one.",
    )


def _scoring_object(value: Any) -> Any:
    if callable(value) or hasattr(value, "score"):
        return value
    raise ValueError("must be a reward's name, a group of options, or from Python a function or a RewardFn")


def _name_of_object(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


ScoringObject = SkipJsonSchema[Annotated[Any, PlainValidator(_scoring_object), PlainSerializer(_name_of_object)]]
"""A function or reward, given from Python; written as its name."""


class CapabilitySuite(BaseConfig):
    """Prompts of one type of task, and what tells how well they were answered."""

    name: str = Field(min_length=1, description="Name of the suite, by which results are compared.")
    task: str = Field(
        "general",
        min_length=1,
        description="Type of task, such as `reasoning`; suites of one type are also reported together.",
    )
    prompts: str | list[Any] = Field(
        description="File of prompts (any that `rlhf sample` reads), or a list of texts, chats or rows; their columns, such as"
        " `answer`, reach the validator.",
        min_length=1,
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Column of the record type `prompt` → the file's own name, such as `prompt: question`.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Prompts to take from a file, from the first; larger finds smaller regressions, null takes all.",
    )
    validator: RewardConfig | ScoringObject = Field(
        description="Reward that scores completions: a name, or `{name: …, options: {…}}`. With 1 for right and 0 for wrong the"
        " suite's value is an accuracy."
    )
    pass_score: float | None = Field(
        None,
        description="Score from which a completion passes and counts 1, any other 0; larger is stricter. Null takes scores as"
        " they are.",
    )
    generation: CapabilitySamplingConfig = Field(
        default_factory=CapabilitySamplingConfig,
        description="How completions are drawn; by default the most likely tokens.",
    )
    n: int = Field(
        1, ge=1, description="Completions per prompt, of which the mean counts; larger has less noise and costs more."
    )

    @field_validator("validator")
    @classmethod
    def _weight_means_nothing(cls, value: Any) -> Any:
        if isinstance(value, RewardConfig) and value.weight != 1:
            raise ValueError("a validator is alone, so its weight has no meaning: leave it out")
        return value

    @model_validator(mode="after")
    def _repeats_differ(self) -> CapabilitySuite:
        if self.n > 1 and self.generation.temperature == 0:
            raise ValueError(
                f"{self.n} completions per prompt (`n`) are the same at temperature 0: set `generation.temperature`"
            )
        return self


class CapabilityTestsConfig(BaseConfig):
    """Suites that are run before and after a stage, and what counts as a regression."""

    suites: list[CapabilitySuite] = Field(
        min_length=1, description="Suites of prompts; more of them need clearer drops each."
    )
    alpha: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Chance of any false alarm, over all suites of a comparison; larger finds smaller drops, and more that aren't"
        " there.",
    )
    threshold: float = Field(
        2.0,
        ge=0,
        description="Points (hundredths of the validator's scale) by which a suite's value must have dropped, besides being"
        " significant; larger tolerates more.",
    )
    resamples: int = Field(
        20_000,
        ge=1000,
        description="Random sign flips of the test of graded scores; larger makes its p-value more exact, and slower.",
    )

    @field_validator("suites")
    @classmethod
    def _names_differ(cls, suites: list[CapabilitySuite]) -> list[CapabilitySuite]:
        taken = [name for name, count in Counter(suite.name for suite in suites).items() if count > 1]
        if taken:
            raise ValueError(f"two suites are named `{taken[0]}`: rename one")
        return suites

    @model_validator(mode="after")
    def _resamples_can_reach_alpha(self) -> CapabilityTestsConfig:
        least = 10 * len(self.suites) / self.alpha
        if self.resamples < least:
            raise ValueError(
                f"{self.resamples} `resamples` can't show what `alpha` {self.alpha:g} asks of {len(self.suites)} suites: set at"
                f" least {least:.0f}"
            )
        return self
