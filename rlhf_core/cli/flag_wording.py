"""Options in the messages of a command without a configuration file, as its flags: `dataset.format` is `--dataset.format`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from rlhf_core.infra.errors import RLHFError

_COLUMNS = re.compile(r"(set )?`((?:dataset\.)?columns)`(?: to|, such as) `(\{[^`]*\})`")
_LEFT_OUT = re.compile(r"leave `(\w+)` out of `((?:dataset\.)?columns)`")
_OPTION = re.compile(r"(?<!unknown option )`(dataset\.[a-z_]+(?:\.\w+)*|max_length)`")
_OF_REWARD = re.compile(r"`?(?:--)?rewards?\b")
_PLACE = re.compile(r"dataset(\.\w+)+")


def say_in_flags(errors: Iterable[RLHFError]) -> None:
    """Have mistakes, and those in their `also`, name options on how rows are read by their flags; not those of rewards."""
    for error in errors:
        if _OF_REWARD.match(error.problem) or _OF_REWARD.match(error.place or ""):
            say_in_flags(error.also)
            continue  # a reward's options may have the same names
        error.problem, error.fix = in_flags(error.problem), error.fix and in_flags(error.fix)
        error.args = (error.problem,)
        if error.place is not None and _PLACE.fullmatch(error.place):
            error.place = f"--{error.place}"
        say_in_flags(error.also)


def in_flags(text: str) -> str:
    """Return a message with options on how rows are read as flags: columns as `--dataset.columns.prompt question`."""
    text = _COLUMNS.sub(lambda found: _columns_in_flags(found[1], found[2], found[3]), text)
    text = _LEFT_OUT.sub(r"leave out `--\2.\1`", text)
    return _OPTION.sub(r"`--\1`", text)


def names_a_file(arguments: Sequence[str]) -> bool:
    """Return whether a command line names a configuration file, in which options are then set."""
    return any(word.endswith((".yaml", ".yml")) for word in arguments)


def _columns_in_flags(verb: str | None, option: str, written: str) -> str:
    """Return the flags that name columns, of which `written` is a mapping in YAML."""
    from rlhf_core.config.yaml_file import parse_scalar

    columns = parse_scalar(written)
    if not isinstance(columns, Mapping):
        return f"{verb or ''}`--{option}` to `{written}`"
    flags = " ".join(f"--{option}.{name} {shlex.quote(str(column))}" for name, column in columns.items())
    return f"{'give ' if verb else ''}`{flags}`"
