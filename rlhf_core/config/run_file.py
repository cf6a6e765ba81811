"""The keys of a run's file that aren't options of its method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

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
    def _files(cls, value: Any) -> Any:
        return _checked(
            [value] if isinstance(value, Mapping) else value, "a path or hub name, or `{path: …, weight: …}`"
        )

    @field_validator("eval_data", mode="before")
    @classmethod
    def _held_out_files(cls, value: Any) -> Any:
        return None if value is None else _checked(value, "a path or hub name")


def _checked(value: Any, kind: str) -> Any:
    """Return a path or a list of them, with groups as `DataFile` where `kind` has them; refuse anything else.

    pydantic would say of each wrong item one thing for each type that it might have had.

    Args:
        kind: what an item may be, in words.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("no_path", "must be a path or hub name, or a list of such")
    items: list[Any] = []
    wrong: list[InitErrorDetails] = []
    for number, item in enumerate(value):
        at = ("list", number)  # as pydantic names a place: after a value that may be of several types, which one it is
        if isinstance(item, Mapping) and "{" in kind:
            try:
                items.append(DataFile.model_validate(dict(item)))
            except ValidationError as error:
                wrong += [
                    InitErrorDetails(
                        type=one["type"], loc=(*at, "group", *one["loc"]), input=one["input"], ctx=one.get("ctx", {})
                    )
                    for one in error.errors(include_url=False)
                ]
        elif isinstance(item, str | DataFile):
            items.append(item)
        else:
            problem = PydanticCustomError("no_path", "must be {kind}", {"kind": kind})
            wrong.append(InitErrorDetails(type=problem, loc=at, input=item))
    if wrong:
        raise ValidationError.from_exception_data("data", wrong)
    return items
