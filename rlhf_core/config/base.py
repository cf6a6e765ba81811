"""The base class of every configuration, and its errors in plain words. Importing this imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from rlhf_core.config.fields import alternatives, key_and_group
from rlhf_core.config.known_names import SAME_NAME, said_elsewhere, said_here
from rlhf_core.infra.errors import ConfigError, RLHFError, did_you_mean, nearest, shortened

ConfigType = TypeVar("ConfigType", bound="BaseConfig")


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # pydantic has no public name for it


class _OneMessage(ModelMetaclass):
    """Makes what is wrong with `DPOConfig(lr=1e-4)` one `ConfigError`, as with a file or a flag; others are its notes."""

    # Not in `__init__`, which pydantic would call for groups as well, whose mistakes belong to those of the whole.
    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            found = config_error(cast("type[BaseModel]", cls), error, cls.__name__)
            for other in found.also:
                found.add_note(str(other))  # Python prints notes below the error
            raise found from None


class BaseConfig(BaseModel, metaclass=_OneMessage):
    """The base class of every configuration: frozen; an unknown key is an error, never ignored."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    alone: ClassVar[str | None] = None
    """The field that a plain text sets where it is given in place of the group: `path` in `teacher: PATH`."""

    beside: ClassVar[tuple[str, ...]] = ()
    """What is given beside the configuration: to a trainer its model, and to a configuration file as further keys."""

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, values: Any) -> Any:
        return {cls.alone: values} if cls.alone is not None and isinstance(values, str) else values

    @field_validator("*", mode="before")
    @classmethod
    def _flag_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number."""
        # Python counts true as 1 and false as 0, so `max_steps: yes` would quietly train for one step.
        if isinstance(value, bool) and info.field_name in cls.model_fields:
            kinds = alternatives(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and (int in kinds or float in kinds):
                raise PydanticCustomError("flag_for_number", "must be a number")
        return value

    @classmethod
    def parse(
        cls: type[ConfigType], values: Mapping[str, Any], *, place: Mapping[str, str] | str = "config"
    ) -> ConfigType:
        """Build from plain values; what is wrong becomes one `ConfigError` that names the key and the nearest right one.

        `place` is where the values came from: one text, or a text for each dotted key (a file and line, a flag). Of several
        mistakes the others are the error's `also`.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise config_error(cls, error, place) from None

    @classmethod
    def given(
        cls: type[ConfigType], config: ConfigType | None, options: Mapping[str, Any], *, place: str
    ) -> ConfigType:
        """Return the configuration that a caller gave whole, as `config=…`, or else that of the options given by name.

        Raises:
            ConfigError: both are given; or as `parse`, for which `place` is.
        """
        if config is None:
            return cls.parse(options, place=place)
        if options:
            fix = f"`config.updated({next(iter(options))}=…)`"
            raise ConfigError("options are given beside a configuration", place=place, fix=fix)
        return config

    @classmethod
    def parse_sound(
        cls: type[ConfigType], values: Mapping[str, Any], *, place: Mapping[str, str] | str, instead: Mapping[str, Any]
    ) -> tuple[ConfigType | None, frozenset[str], list[RLHFError]]:
        """Return what can be built without the wrong keys, which keys those are, and every mistake.

        It is for a check that goes on, to find all other mistakes: what is built stands for no configuration that was asked for.
        None is built where even the other keys don't go together.

        Args:
            place: as in `parse`.
            instead: values for required keys that are wrong or missing.
        """
        try:
            return cls.model_validate(dict(values)), frozenset(), []
        except ValidationError as error:
            first = config_error(cls, error, place)
            wrong = frozenset(str(one["loc"][0]) for one in error.errors(include_url=False) if one["loc"])
        kept = {key: value for key, value in values.items() if str(key) not in wrong}
        try:
            sound = cls.model_validate(kept | {key: value for key, value in instead.items() if key not in kept})
        except ValidationError:
            return None, wrong, [first, *first.also]
        return sound, wrong, [first, *first.also]

    def choices(self) -> dict[str, str]:
        """Return what options that were left open come to, by name, for `rlhf show METHOD --OPTION VALUE`. The default has
        none."""
        return {}

    def updated(self: ConfigType, **changes: Any) -> ConfigType:
        """Return a copy with these fields changed, validated again."""
        return type(self).parse({**self.model_dump(exclude_unset=True), **changes})


def between_commas(value: Any) -> Any:
    """Return names or numbers as a list, for options that are given several: of a text, or of texts, those between its commas."""
    if isinstance(value, str):
        return [one.strip() for one in value.split(",") if one.strip()]
    if isinstance(value, list):
        return [one for item in value for one in (between_commas(item) if isinstance(item, str) else [item])]
    return value


_PLAIN = {
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be a mapping, such as `{name: value}`",
    "list_type": "must be a list",
}
"""Error types of pydantic → our words."""


_PRECISIONS = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "fp32": "float32", "f32": "float32", "32": "float32", "16": "fp16",
}  # fmt: skip
"""Names of number formats elsewhere → ours."""


def refused(error: ConfigError, at: Sequence[str], value: Any) -> ValidationError:
    """Return what a validator of several options raises, so that the error names one of them.

    Args:
        error: what is wrong, and how to mend it; its place is left to `parse`.
        at: the fields that lead to the option, and keys of mappings.
        value: the option's; shown where `error` has no `got` itself.
    """
    text = "{problem}" + ("; {fix}" if error.fix else "")
    details = {"problem": error.problem, "got": error.got, "fix": error.fix}
    kind = PydanticCustomError("refused", text, details)
    return ValidationError.from_exception_data("option", [InitErrorDetails(type=kind, loc=tuple(at), input=value)])


def config_error(
    cls: type[BaseModel], error: ValidationError, place: Mapping[str, str] | str, *, within: str = ""
) -> ConfigError:
    """Return pydantic's first error about a configuration as a `ConfigError` with key, place and fix; the others are its `also`.

    `place` is where the values came from: one text, or a text for each dotted key. `within` is the dotted key of the group that
    holds the configuration.
    """
    errors = _without_mistyped(error.errors(include_url=False))
    # An option that is missing may have been given under a wrong name.
    wrong = (one for one in errors if one["type"] == "extra_forbidden" and one["loc"][:-1] == errors[0]["loc"][:-1])
    first = next(wrong, errors[0]) if errors[0]["type"] == "missing" else errors[0]
    found = _one_error(cls, first, place, within)
    others = [one for one in errors if one is not first]
    # Each way in which one value could be read has an error of its own.
    texts = {(one.problem, one.place): one for one in (_one_error(cls, other, place, within) for other in others)}
    texts.pop((found.problem, found.place), None)
    found.also = tuple(texts.values())
    return found


def _without_mistyped(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Return pydantic's errors without those of missing options that are there under a mistyped name, which has its own."""
    given = [(one["loc"][:-1], str(one["loc"][-1])) for one in errors if one["type"] == "extra_forbidden"]
    return [
        one
        for one in errors
        if one["type"] != "missing"
        or not any(at == one["loc"][:-1] and nearest(name, [str(one["loc"][-1])]) for at, name in given)
    ]


def _one_error(cls: type[BaseModel], first: ErrorDetails, place: Mapping[str, str] | str, within: str) -> ConfigError:
    """Return one of pydantic's errors as a `ConfigError`."""
    key, group = key_and_group(cls, first["loc"])
    key = ".".join(filter(None, [within, key]))
    where = place if isinstance(place, str) else place_of(key, place)
    # Of a check over several options, all of them would be shown.
    got = None if first["type"] == "value_error" and isinstance(first["input"], Mapping) else shortened(first["input"])
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        return ConfigError(f"unknown option `{key}`", place=where, fix=_meant(name, cls, group))
    if first["type"] == "missing":
        return ConfigError(f"`{key}` is missing", place=where, fix=f"set `{key}`")
    message = _PLAIN.get(
        first["type"], first["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    )
    if first["type"] in ("model_type", "model_attributes_type"):
        message = f"expected a group of options ({', '.join(group.model_fields)})"
    if first.get("ctx", {}).get("min_length") == 1:
        message = "must not be empty"
    fix: str | None = None
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        meant = _PRECISIONS.get(first["input"].casefold().removeprefix("torch."))
        choice = meant if meant in choices else nearest(first["input"], choices)
        fix = f"did you mean `{choice}`?" if choice else None
    if first["type"] == "refused":
        details = first["ctx"]
        message, fix = details["problem"], details["fix"]
        # A name that isn't known is in the message already.
        got = details["got"] or (None if f"`{first['input']}`" in message else got)
    named = where.lstrip("-").replace("-", "_") == key  # by its flag
    problem = f"`{key}`: {message}" if key and not named else message
    if fix is None and key in SAME_NAME and first["type"] in ("literal_error", "model_type", "model_attributes_type"):
        fix = SAME_NAME[key]
    if isinstance(first["input"], bool) and first["type"] not in ("model_type", "model_attributes_type"):
        mend = "write a number" if first["type"] == "flag_for_number" else "put the text in quotes if you meant text"
        fix = f"YAML reads yes, no, on and off as true and false: {mend}"
    return ConfigError(problem, place=where, got=got, fix=fix)


def _meant(name: str, cls: type[BaseModel], group: type[BaseModel]) -> str:
    """Return what may have been meant by a name that a group of options, or a configuration itself, doesn't have."""
    beside = getattr(cls, "beside", ())
    if name in beside and group is cls:
        return f"give it to the trainer, beside its configuration: `Trainer(config, {name}=…)`"
    found = said_here(name, cls, beside)
    if found is not None and (given := found.split("`")[1]) in beside:
        return (
            f"it is `{given}` here, and is given to the trainer, beside its configuration: `Trainer(config, {given}=…)`"
        )
    if found is None and not nearest(name, group.model_fields):
        found = said_elsewhere(name)
    return found or did_you_mean(name, group.model_fields)


def place_of(key: str, places: Mapping[str, str]) -> str:
    """Return where a dotted key was set, else the place of the nearest group around it, else of the whole configuration."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "config")
