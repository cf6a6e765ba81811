"""The options of a round of self-improvement. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.flaw_run import FlawDetectionConfig
from rlhf_core.config.online import RewardConfig

TRAINER = "sft"
"""The method of a training that names none."""
SAMPLED = ("model", "prompts", "output")
"""Keys of sampling that the stage sets itself."""
TRAINED = ("model", "data", "output")
"""Keys of training that the stage sets itself."""


class FlawFilterConfig(FlawDetectionConfig):
    """What is done about flaws of completions that are to be trained on. The proxy of reward hacking is the `check`."""

    action: Literal["drop", "flag"] = Field(
        "drop",
        description="`drop` doesn't train on a completion with a flaw; `flag` does, and writes its flaws into the row's column"
        " `flaws`.",
    )


class ImprovementConfig(BaseConfig):
    """Rounds of sampling, filtering by a check, and training on what is kept."""

    model: str = Field(min_length=1, description="Policy to improve: a directory or a hub name.")
    prompts: list[str] = Field(
        min_length=1, description="Files of prompts whose answers `check` can judge, or hub names; more teach more."
    )
    rounds: int = Field(
        1, ge=1, description="Rounds of sampling and training; each samples from the policy that the one before made."
    )
    sampler: dict[str, Any] = Field(
        default_factory=lambda: {"method": "generate", "n": 8},
        description="Sampler of the completions: `method`, `n` per prompt, and the options of `rlhf sample`. Another seed is"
        " drawn for each round.",
    )
    check: RewardConfig = Field(
        default_factory=lambda: RewardConfig(name="numeric_answer"),
        description="Reward that judges completions: a name, or `{name: …, options: {…}}`.",
    )
    at_least: float = Field(
        0.5, allow_inf_nan=False, description="Least score of a completion that is kept; larger is stricter."
    )
    flaws: FlawFilterConfig | None = Field(
        None, description="Look for flaws in completions before they are trained on; null doesn't."
    )
    keep: int = Field(
        4,
        ge=1,
        description="Most different completions kept per prompt, the best first; larger trains more on easy prompts.",
    )
    train: dict[str, Any] = Field(
        default_factory=lambda: {"method": TRAINER},
        description="Training on what is kept: `method`, a trainer of the record type `sft`, and its options.",
    )
    restart: bool = Field(
        False,
        description="Train each round from the stage's first model on that round's completions (as STaR does), instead of"
        " training on.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the rounds; another value draws other completions.")

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("check", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("sampler", "train", mode="before")
    @classmethod
    def _method_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value

    @field_validator("sampler", "train")
    @classmethod
    def _own_keys(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        set_by_stage = SAMPLED if info.field_name == "sampler" else TRAINED
        if given := next((name for name in set_by_stage if name in value), None):
            raise ValueError(f"`{given}` is set by the stage itself, and isn't an option of its `{info.field_name}`")
        return value
