"""The options of computing a policy's Fisher information on rows of a task. Importing this imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.training import DatasetConfig


class FisherConfig(BaseConfig):
    """How the diagonal Fisher information of a policy is estimated."""

    labels: Literal["sampled", "data"] = Field(
        "sampled",
        description="Tokens whose log-probabilities are differentiated: `sampled`, drawn from the policy at each response"
        " position of the rows (the true Fisher information), or `data`, the rows' own (the empirical one).",
    )
    samples: int = Field(
        1,
        ge=1,
        description="Draws per row; larger has less noise and takes longer. More rows help more than more draws.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Most rows, chosen at random; larger has less noise and takes longer, null takes all. A few hundred will do.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of the choice of rows and of the draws; another one draws others."
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Most tokens in a prompt with its response; larger keeps more text and takes more memory. Null takes what the"
        " model has positions for, at most 1,024.",
    )
    dataset: DatasetConfig = Field(default_factory=DatasetConfig, description="How rows are read.")

    @model_validator(mode="after")
    def _draws_differ(self) -> FisherConfig:
        if self.labels == "data" and self.samples > 1:
            raise ValueError("a row's own tokens are the same in each of several `samples`: set `labels: sampled`")
        if self.dataset.streaming:
            raise ValueError("`dataset.streaming` has no meaning here: rows are chosen among all; set `limit`")
        return self


class FisherRunConfig(FisherConfig):
    """What `rlhf fisher` reads and writes, beside how the Fisher information is estimated."""

    data: list[str] = Field(
        min_length=1,
        description="Rows of the task, with prompts and responses: files, folders or hub names; more rows have less noise.",
    )
    output: str = Field(min_length=1, description="New directory for the Fisher information and the weights.")

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
