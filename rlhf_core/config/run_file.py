"""The keys of a run's file that aren't options of its method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from rlhf_core.config.base import BaseConfig


class DataFile(BaseConfig):
    """Rows to train on, and how often each of them is seen."""

    path: str = Field(min_length=1, description="Path of a file or folder, or a hub name.")
    weight: float = Field(
        1.0,
        gt=0,
        description="How often each of its rows occurs in an epoch: 2 is twice, 0.5 about half of them (the same ones in every"
        " epoch), 1.5 all of them and about half of them again.",
    )


class RunConfig(BaseConfig):
    """The keys of a run's file that aren't options of its method."""

    KEYS: ClassVar[tuple[str, ...]] = ("method", "model", "data", "eval_data", "output", "preset")

    method: str = Field(min_length=1, description="Name of the method, as `rlhf list trainers` shows it.")
    model: str = Field(min_length=1, description="Path or hub name of the model to train.")
    data: str | list[str | DataFile] = Field(
        description="Path or hub name of the rows to train on, or several, each alone or as `{path: …, weight: 2}`."
    )
    eval_data: str | list[str] | None = Field(
        None, description="Path, paths or hub name of rows held out; null evaluates nothing."
    )
    output: str | None = Field(None, description="Run directory; null names one `runs/METHOD-DATE`.")
    preset: str | None = Field(None, description="Preset whose options apply where the file sets none: `7b` or `70b`.")

    @field_validator("data", mode="before")
    @classmethod
    def _one_file_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, Mapping) else value
