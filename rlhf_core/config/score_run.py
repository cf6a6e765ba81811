"""The options of scoring files of completions by a reward, beside those of the reward. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from rlhf_core.config.base import BaseConfig


class ScoreRunConfig(BaseConfig):
    """What is scored, how, and where the scores are written."""

    data: str | list[str] = Field(description="Files of rows that hold completions, a folder, or a hub name.")
    output: str | None = Field(
        None, description="File that rows are written to, *.jsonl; null prints the summary alone."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="`prompt`, `completion`, `completions`, `response`, `messages`, `chosen` or `rejected` → the data's own"
        " name.",
    )
    score_column: str = Field(
        "score",
        min_length=1,
        description="Name of the new column, which holds a list where a row has several completions (`scores` by default); of a"
        " pair it gets `chosen_` and `rejected_` before it.",
    )
    split: str = Field("train", min_length=1, description="Split of a hub dataset to score.")
    limit: int | None = Field(None, ge=1, description="Rows to score, from the first; larger scores more, null all.")
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Rows that are scored together and then written; larger suits a model, smaller loses less when it is stopped."
        " Null begins with 16 and takes up to 512 as long as that is quick.",
    )
    time_limit: float | None = Field(
        600.0, gt=0, description="Seconds that one call of the reward may take; larger allows slower ones, null any."
    )
    runs_in: Literal["auto", "main", "thread", "process"] = Field(
        "auto", description="Where the reward runs; see the same option of a run's `rewards`."
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="Most calls of it at once, outside the main thread; larger is faster for one that waits.",
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _are_names(cls, value: Any) -> Any:
        return {str(key): str(name) for key, name in value.items()} if isinstance(value, Mapping) else value
