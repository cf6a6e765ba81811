"""Flags of the command line: `--lora.rank 8` as options of a configuration, typed by its fields.

A flag is named as the option is, with `-` and `_` alike and a dot between a group and its option. `--flag value` and
`--flag=value` mean the same; a flag of a boolean, or of a group that is off by default (`--lora`), may have no value; a list is
given by repeating the flag, or as `[a, b]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.fields import alternatives, group_of, is_group, option_at, option_names
from rlhf_core.config.known_names import as_flags, said_elsewhere, said_here
from rlhf_core.config.yaml_file import parse_scalar
from rlhf_core.infra.errors import ConfigError, Mistakes, either, nearest_names

_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Flag:
    """One flag as it was typed; `text` is None where no value was given."""

    name: str
    text: str | None

    @property
    def typed(self) -> str:
        return f"--{self.name}"

    @property
    def key(self) -> str:
        """The dotted option that it names."""
        return self.name.replace("-", "_")


def lex(tokens: Sequence[str]) -> list[Flag]:
    """Return the command-line tokens after `rlhf train METHOD` as flags. Raises ConfigError for a token that belongs to none."""
    flags: list[Flag] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or len(token) == 2:
            fix = "options are written `--name value`"
            if "." in token and Path(token).is_file():
                fix += f", as `--data {token}`"
            if flags and flags[-1].text is not None and not token.startswith("-"):
                fix = f"quote a value with blanks; give a list as `{flags[-1].typed} A {flags[-1].typed} B`"
            raise ConfigError("unexpected argument", place="command line", got=f"`{token}`", fix=fix)
        name, equals, text = token[2:].partition("=")
        if equals:
            flags.append(Flag(name, text))
        elif rest and (not rest[0].startswith("-") or rest[0] == "-" or _NEGATIVE.match(rest[0])):
            flags.append(Flag(name, rest.pop(0)))
        else:
            flags.append(Flag(name, None))
    return flags


def convert(
    flags: Iterable[Flag],
    config: type[BaseModel],
    *,
    owner: str,
    also: Iterable[str] = (),
    mistakes: Mistakes | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each flag's value by dotted option, typed by the configuration's field, and its place for messages.

    `owner` names the configuration in messages ("dpo"), and `also` are further names that may have been meant. Flags with a
    mistake are left out, and those are added to `mistakes`; where that is None they are raised.

    Raises:
        ConfigError: an unknown option (with the nearest), one without a value, or one given twice.
    """
    found = Mistakes() if mistakes is None else mistakes
    grouped: dict[str, list[Flag]] = {}
    members: dict[str, tuple[Any, ...]] = {}
    for flag in flags:
        if (option := option_at(config, flag.name)) is None:
            found.append(unknown_option(flag.name, config, owner=owner, place=flag.typed, also=also))
            continue
        key, types = option
        members[key] = types
        grouped.setdefault(key, []).append(flag)
    values: dict[str, Any] = {}
    for key, given in grouped.items():
        with found.noted():
            values[key] = _value(given, members[key])
    if mistakes is None:
        found.raise_first()
    return values, {key: given[0].typed for key, given in grouped.items()}


_VERBS = ("data", "evaluate", "find-flaws", "fisher", "score")
"""Owners of options that are commands, not methods."""


def unknown_option(
    name: str, config: type[BaseModel], *, owner: str, place: str, also: Iterable[str] = ()
) -> ConfigError:
    """Return the error for an option that a configuration doesn't have, with the nearest that it has, or what another trainer's
    name is here."""
    problem, names = f"unknown option `{name}` of {owner}", list(option_names(config))
    if (ours := said_here(name, config, also)) is not None:
        return ConfigError(problem, place=place, fix=as_flags(ours) if place.startswith("--") else ours)
    near = _near_entries(name, config) or nearest_names(name, [*also, *names])
    near = near or nearest_names(name.rpartition(".")[2], names)
    if not near and (ours := said_elsewhere(name)) is not None:
        return ConfigError(problem, place=place, fix=ours)
    dashes = "--" if place.startswith("--") else ""
    hint = f"did you mean {either(f'{dashes}{one}' for one in near)}? " if near else ""
    listed = f"rlhf {owner} --help" if owner in _VERBS else f"rlhf show {owner} --all"
    return ConfigError(problem, place=place, fix=f"{hint}`{listed}` lists them")


def _near_entries(name: str, config: type[BaseModel]) -> list[str]:
    """Return entries of mappings that may be meant: of `dataset.colums.prompt` the mapping is mistyped, and its key is free."""
    group, _, key = name.rpartition(".")
    if not group or option_at(config, group) is not None:
        return []
    mappings = [
        one
        for one in option_names(config)
        if any(get_origin(kind) is dict for kind in (option_at(config, one) or ("", ()))[1])
    ]
    return [f"{one}.{key}" for one in nearest_names(group, mappings)]


def _may_be_text(member: Any) -> bool:
    """Return whether a plain text may be given for a group, as in `--rewards exact`."""
    return is_group(member) and getattr(member, "alone", None) is not None


def _value(given: Sequence[Flag], members: tuple[Any, ...]) -> Any:
    """Return the value of an option from all of its flags, in order; several are the items of a list.

    Raises:
        ConfigError: several flags for an option that isn't a list, or one without a value.
    """
    values = [_one(flag, members) for flag in given]
    if len(values) == 1:
        return values[0]
    if not any(get_origin(member) is list for member in members):
        texts = " and ".join(f"`{flag.text}`" for flag in given)
        raise ConfigError(
            f"given {len(given)} times, but it takes one value",
            place=given[0].typed,
            got=texts,
            fix="keep one of the values",
        )
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _one(flag: Flag, members: tuple[Any, ...]) -> Any:
    """Return one flag's value: read as YAML, but kept as typed where the option takes text; a bare flag is true."""
    if flag.text is None:
        if bool in members or any(is_group(member) and not _may_be_text(member) for member in members):
            return True
        raise ConfigError("needs a value", place=flag.typed, fix=f"write `{flag.typed} VALUE` or `{flag.typed}=VALUE`")
    if any(flag.text in get_args(member) for member in members if get_origin(member) is Literal):
        return flag.text
    value = parse_scalar(flag.text)
    accepted = {get_origin(member) or member for member in members}
    if isinstance(value, list | Mapping) and not flag.text.lstrip().startswith(("[", "{")):
        value = flag.text  # `Question: why?` is YAML for a mapping, and nobody writes one like that into a flag
    if isinstance(value, list | Mapping) or (value is None and flag.text and NoneType in accepted):
        return value
    if str in accepted or (not isinstance(value, bool) and any(map(_may_be_text, members))):
        return flag.text  # a name such as `2024` or `yes` stays text
    if list in accepted:
        items = _items(members)
        return [flag.text if str in items or any(map(_may_be_text, items)) else value]
    return value


def _items(members: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the types that a list's items may have; a literal counts as text."""
    lists = [member for member in members if get_origin(member) is list]
    items = [item for member in lists for part in get_args(member) for item in alternatives(part)]
    return tuple(str if get_origin(item) is Literal else item for item in items)


def refuse_unknown(
    values: Mapping[str, Any], config: type[BaseConfig], name: str, places: Mapping[str, str], keys: Sequence[str]
) -> None:
    """Raise ConfigError for a key of a file that isn't an option of the method `name`; of several the others are its `also`.

    `keys` are the keys that any such file may have (`model`, `data`), among which the nearest is suggested too.
    """
    mistakes = Mistakes(
        unknown_option(str(key), config, owner=name, place=places.get(str(key), places[""]), also=keys)
        for key in values
        if str(key) not in config.model_fields
    )
    mistakes.raise_first()


def convert_options(
    flags: Sequence[Flag], config: type[BaseConfig], name: str, keys: Sequence[str], mistakes: Mistakes | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values and places, by dotted option, of flags that set options of the method `name`.

    `keys` are the names that aren't its options (`model`, `data`), among which the nearest is suggested too. Flags with a mistake
    are left out, and those are added to `mistakes`; where that is None they are raised.

    Raises:
        ConfigError: an unknown option, or an option inside a group that another flag switches off.
    """
    found = Mistakes() if mistakes is None else mistakes
    known = []
    for flag in flags:
        head = flag.key.partition(".")[0]
        near = nearest_names(head, [*keys, *config.model_fields])
        wrong = head not in config.model_fields and said_here(head, config, keys) is None
        if wrong and near and {*near} <= {*keys}:
            fix = f"did you mean {either(f'--{one}' for one in near)}?"
            found.append(ConfigError(f"unknown option `{flag.name}`", place=flag.typed, fix=fix))
        else:
            known.append(flag)
    values, places = convert(known, config, owner=name, also=keys, mistakes=found)
    for group in [key for key in values if any(other.startswith(f"{key}.") for other in values)]:
        if values[group] in (False, None):
            inner = next(other for other in values if other.startswith(f"{group}."))
            found.append(
                ConfigError(f"`{inner}` is set but `{group}` is off", place=places[inner], fix="remove one of the two")
            )
            values = {key: value for key, value in values.items() if not key.startswith(f"{group}.")}
            continue
        switched = values.pop(group)  # `--lora --lora.rank 8`, in either order: the group is on, and so filled
        whole = spread({group: switched}, config)[group]  # `--teacher M --teacher.precision bf16`: so is its path
        values = {**({group: whole} if isinstance(whole, Mapping) else {}), **values}
    if mistakes is None:
        found.raise_first()
    return values, places


def spread(values: Mapping[str, Any], config: type[BaseConfig]) -> dict[str, Any]:
    """Return options in their full form: `teacher: PATH` as `{path: PATH}`, one reward as a list."""
    whole = dict(values)
    for name, value in values.items():
        annotation = config.model_fields[name].annotation if name in config.model_fields else None
        alone = getattr(group_of(annotation), "alone", None)
        if alone is not None and get_origin(annotation) is list:
            whole[name] = [value] if isinstance(value, str | Mapping) else value
        elif alone is not None and isinstance(value, str):
            whole[name] = {alone: value}
    return whole
