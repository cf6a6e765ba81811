"""Values that JSON, Arrow and Python allow and nothing behind them can use: found in a row before anything else reads it."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Mapping
from typing import Any

from rlhf_core.infra.errors import DataError, shortened

DEEPEST = 100
"""Most levels of lists and mappings in each other."""
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
"""Python writes integers of no more digits than those below it have."""


def check_sound(values: Mapping[Any, Any], place: str) -> None:
    """Raise `DataError` with the column where a row holds what can't be encoded or written: half a surrogate pair, NaN, an
    integer of thousands of digits, or lists nested without end."""
    for name, value in values.items():
        if not isinstance(name, str):
            raise DataError("a column's name isn't text", place=place, got=shortened(name))
        _check_text(name, "a column's name", place)
        _check(value, name, place, 0)


def _check(value: Any, name: str, place: str, depth: int) -> None:
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
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a surrogate pair, which is no character",
            place=place,
            got=f"\\u{ord(text[error.start]):04x} at character {error.start + 1}",
            fix="write the whole pair, or leave it out",
        ) from None


def as_json(value: Any) -> Any:
    """Return a value as JSON holds it: sequences as lists, keys as text, what JSON has no kind for as its text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def is_json(value: Any) -> bool:
    """Tell whether a value is one of JSON's."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_json(item) for item in value)
    return value is None or isinstance(value, str | bool | int | float)


def written_whole(value: Any) -> bool:
    """Tell whether `repr` of a value holds all of it, so that equal texts are equal values."""
    kind = type(value)
    if kind is dict:
        return all(written_whole(key) and written_whole(item) for key, item in value.items())
    if kind is list or kind is tuple:
        return all(map(written_whole, value))
    return value is None or kind in _WRITTEN_WHOLE
