"""The keys of a run's file that aren't options of its method."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from rlhf_core.config.base import BaseConfig, refused
from rlhf_core.config.training import DatasetConfig, RowFormat
from rlhf_core.infra.errors import ConfigError


def is_object(value: Any) -> bool:
    """Tell whether a run's record has this in place of a model or of data that were objects in Python, such as `<list of 8>`."""
    return isinstance(value, str) and re.fullmatch(r"<[A-Za-z_]\w*( of \d+)?>", value) is not None


class DataFile(BaseConfig):
    """Rows to train on or to evaluate on: where they are, how many of them are used, and how they are read."""

    path: str = Field(
        min_length=1,
        description="Path of a file or folder, a pattern of files, a hub name, or `hf://datasets/OWNER/NAME/FILE`.",
    )
    weight: float = Field(
        1.0,
        gt=0,
        description="How often each of its rows occurs in an epoch: 2 is twice, 0.5 about half of them (the same ones in every"
        " epoch), 1.5 all of them and about half of them again.",
    )
    rows: int | None = Field(
        None,
        ge=1,
        description="How many rows it gives to an epoch: its first ones, and where it has fewer, those again from the beginning"
        " (of held-out ones each once); null takes what `weight` says.",
    )
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the rows of every step that are drawn from it, by probability; entries without a share have the"
        " rest. Larger trains more on it; null draws rows of all entries alike.",
    )
    split: str | None = Field(
        None, min_length=1, description="Its split, where it has several; null takes `dataset.split` (or `eval_split`)."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Column of the record type → this file's own name, in place of or beside those in `dataset.columns`.",
    )
    format: RowFormat | None = Field(None, description="Shape of its rows; null takes `dataset.format`.")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Its name in `data.json`, and of several held-out files in the names of their metrics (`eval_NAME_loss`);"
        " null takes the file's.",
    )

    @model_validator(mode="after")
    def _one_amount(self) -> DataFile:
        """Refuse a weight beside another amount."""
        if self.weight != 1 and (
            other := "rows" if self.rows is not None else "share" if self.share is not None else None
        ):
            raise ValueError(f"`weight` and `{other}` both say how much of it is used: leave one out")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return its path and what differs from the defaults, as a person writes it."""
        return {
            name: value
            for name, value in write(self).items()
            if name == "path" or value != type(self).model_fields[name].get_default(call_default_factory=True)
        }

    def options(self, dataset: DatasetConfig, split: str) -> DatasetConfig:
        """Return how its rows are read, given the options of the whole data and the split that is read of those."""
        own = {
            "split": self.split or split,
            "columns": {**dataset.columns, **self.columns},
            "format": self.format or dataset.format,
        }
        return dataset.model_copy(update=own)


def grouped_by_share(entries: Sequence[DataFile]) -> list[tuple[float, list[int]]]:
    """Return the groups that rows are drawn from: each one's share, and the numbers of its entries, in their order.

    An entry with a share is a group of its own, and those without one are a group together, which has the rest. Without shares
    there is one group.

    Raises:
        ConfigError: the shares don't add up to 1, or leave nothing for the entries without one.
    """
    rest = [number for number, entry in enumerate(entries) if entry.share is None]
    given = math.fsum(entry.share for entry in entries if entry.share is not None)
    left = 1 - given if rest else 0.0
    if rest and left < 1e-9:
        raise ConfigError(
            "the shares leave nothing for an entry without one",
            place="data",
            got=f"they add up to {given:g}, and {entries[rest[0]].path} has none",
            fix="lower them, or leave that entry out",
        )
    if not rest and abs(given - 1) > 1e-6:
        raise ConfigError(
            "the shares of all entries must add up to 1",
            place="data",
            got=f"{given:g}",
            fix="change them, or leave one entry without a share: it gets the rest",
        )
    groups = [(entry.share, [number]) for number, entry in enumerate(entries) if entry.share is not None]
    return sorted([*groups, *([(left, rest)] if rest else [])], key=lambda group: group[1])


class RunConfig(BaseConfig):
    """The keys of a run's file that aren't options of its method."""

    KEYS: ClassVar[tuple[str, ...]] = ("method", "model", "data", "eval_data", "output", "preset")

    method: str = Field(min_length=1, description="Name of the method, as `rlhf list trainers` shows it.")
    model: str = Field(min_length=1, description="Path or hub name of the model to train.")
    data: str | list[str | DataFile] = Field(
        description="Path or hub name of the rows to train on, or several, each alone or as a group: `{path: …, weight: 2}`,"
        " `{path: …, share: 0.3}`, `{path: …, rows: 5000}`."
    )
    eval_data: str | list[str | DataFile] | None = Field(
        None,
        description="Path or hub name of rows held out, or several, each alone or as a group: `{path: …, name: hard}`; null"
        " evaluates nothing.",
    )
    output: str | None = Field(None, description="Run directory; null names one `runs/METHOD-DATE`.")
    preset: str | None = Field(None, description="Preset whose options apply where the file sets none: `7b` or `70b`.")

    @field_validator("data", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value and all(isinstance(one, int | float) for one in value.values()):
            each = ", ".join(f"{{path: {path}, share: {one}}}" for path, one in value.items())
            raise refused(ConfigError("several files are a list", fix=f"write `[{each}]`"), (), dict(value))
        given = _checked([value] if isinstance(value, Mapping) else value, "{path: …, weight: …}")
        if isinstance(given, list) and given:
            try:
                grouped_by_share([DataFile(path=item) if isinstance(item, str) else item for item in given])
            except ConfigError as error:
                raise refused(error, (), error.got) from None
        return given

    @field_validator("eval_data", mode="before")
    @classmethod
    def _held_out_files(cls, value: Any) -> Any:
        if value is None:
            return None
        given = _checked([value] if isinstance(value, Mapping) else value, "{path: …, name: …}")
        for number, item in enumerate(given if isinstance(given, list) else ()):
            if isinstance(item, DataFile) and (item.share is not None or item.weight != 1):
                name = "share" if item.share is not None else "weight"
                error = ConfigError("held-out rows are scored once each", place="eval_data", fix=f"leave `{name}` out")
                raise refused(error, ("list", str(number), "group", name), getattr(item, name))
        return given


def _checked(value: Any, group: str) -> Any:
    """Return a path, or a list of paths and of groups, which become `DataFile`; refuse anything else.

    pydantic would say of each wrong item one thing for each type that it might have had.

    Args:
        group: an example of a group.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("no_path", "must be a path or hub name, or a list of such")
    items: list[Any] = []
    wrong: list[InitErrorDetails] = []
    for number, item in enumerate(value):
        at = ("list", number)  # as pydantic names a place: after a value that may be of several types, which one it is
        if isinstance(item, Mapping):
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
            problem = PydanticCustomError("no_path", "must be a path or hub name, or `{group}`", {"group": group})
            wrong.append(InitErrorDetails(type=problem, loc=at, input=item))
    if wrong:
        raise ValidationError.from_exception_data("data", wrong)
    return items
