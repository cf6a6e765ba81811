"""The options of a search for flaws in completions. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from rlhf_core.config.base import BaseConfig, between_commas
from rlhf_core.config.online import RewardConfig


class FlawDetectionConfig(BaseConfig):
    """Which flaws are looked for."""

    detectors: list[str] | None = Field(
        None,
        min_length=1,
        description="Detectors, separated by commas: `repetition`, `truncation`, `refusal`, `contradiction`, `prompt_leakage`;"
        " null takes all.",
    )
    verifier: RewardConfig | None = Field(
        None,
        description="Reward that tells right from wrong, by which reward hacking is found: a name, or `{name: …, options: {…}}`;"
        " null doesn't look for it.",
    )
    right_from: float = Field(
        1.0, description="Score of the verifier from which a completion is right; larger calls fewer of them right."
    )

    _names = field_validator("detectors", mode="before")(between_commas)


class FlawRunConfig(FlawDetectionConfig):
    """Which completions are looked at, for what, and where the result is written."""

    data: list[str] = Field(min_length=1, description="Files of rows that hold completions, folders, or hub names.")
    output: str | None = Field(
        None, description="File that rows are written to with their flaws, *.jsonl; null writes none."
    )
    report: str | None = Field(
        None, description="File for the whole report, *.json: every completion's severities, shares and the gap."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="`prompt`, `completion`, `completions`, `response`, `messages`, `chosen` or `rejected` → the data's own"
        " name.",
    )
    split: str = Field("train", min_length=1, description="Split of a hub dataset to look at.")
    limit: int | None = Field(None, ge=1, description="Rows to look at, from the first; larger sees more, null all.")
    proxy: RewardConfig | None = Field(
        None, description="Reward that the policy is trained on: a name, or a reward model's path; with `verifier`."
    )

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _are_names(cls, value: Any) -> Any:
        return {str(key): str(name) for key, name in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _hacking_needs_both(self) -> FlawRunConfig:
        if (self.proxy is None) != (self.verifier is None):
            raise ValueError("reward hacking is a gap between two rewards: give both `proxy` and `verifier`, or none")
        return self
