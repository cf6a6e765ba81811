"""Checks of the values in a row that need no record type: what JSON and Arrow allow but text and JSON can't express."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Mapping
from typing import Any

from rlhf_core.infra.errors import DataError, shortened

DEEPEST = 100
"""How many lists and mappings may be nested in each other."""
_WRITTEN_WHOLE = (
    str,
    bool,
    int,
    float,
    bytes,
    decimal.Decimal,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
)
_LARGEST = 10**4300
"""Python refuses to write integers from here on, which have more than 4,300 digits."""


def check_sound(values: Mapping[Any, Any], place: str) -> None:
    """Check that a row can be encoded and written as JSON.

    Raises:
        DataError: with the column, where it holds half of a surrogate pair, NaN or infinity, an integer of more than 4,300
            digits, or more than 100 nested lists.
    """
    for name, value in values.items():
        if not isinstance(name, str):
            raise DataError("a column's name isn't text", place=place, got=shortened(name))
        _check_text(name, "a column's name", place)
        _check(value, name, place, 0)


def _check(value: Any, name: str, place: str, depth: int) -> None:
    """Check a value and what is in it. `name` is its path in the row (`meta.tags[2]`), `depth` its level below the column."""
    if isinstance(value, str):
        _check_text(value, f"`{name}`", place)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"`{name}` isn't finite", place=place, got=repr(value), fix="repair or delete the row")
    elif isinstance(value, int):
        if not -_LARGEST < value < _LARGEST:
            raise DataError(
                f"`{name}` is an integer of more than 4,300 digits",
                place=place,
                fix="write it as text, or leave it out",
            )
    elif isinstance(value, Mapping | list | tuple):
        if depth == DEEPEST:
            raise DataError(
                f"`{name.split('.')[0].split('[')[0]}` is nested more than {DEEPEST} levels deep", place=place
            )
        if isinstance(value, Mapping):
            for key, item in value.items():
                if isinstance(key, str):
                    _check_text(key, f"a key of `{name}`", place)
                _check(item, f"{name}.{key}", place, depth + 1)
        else:
            for number, item in enumerate(value):
                _check(item, f"{name}[{number}]", place, depth + 1)


def _check_text(text: str, what: str, place: str) -> None:
    """Check that a text can be encoded as UTF-8. `what` is its name in the message."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a surrogate pair, which isn't a character",
            place=place,
            got=f"\\u{ord(text[error.start]):04x} at character {error.start + 1}",
            fix="write the whole pair, or leave it out",
        ) from None


def as_json(value: Any) -> Any:
    """Return a value as JSON can hold it: tuples as lists, keys as text, values of other types as `str` writes them."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def is_json(value: Any) -> bool:
    """Return whether a value is a JSON value at every depth: a tuple, a date or bytes are not."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_json(item) for item in value)
    return value is None or isinstance(value, str | bool | int | float)


def written_whole(value: Any) -> bool:
    """Return whether `repr` shows everything of a value, so that equal texts mean equal values."""
    kind = type(value)
    if kind is dict:
        return all(written_whole(key) and written_whole(item) for key, item in value.items())
    if kind is list or kind is tuple:
        return all(map(written_whole, value))
    return value is None or kind in _WRITTEN_WHOLE
