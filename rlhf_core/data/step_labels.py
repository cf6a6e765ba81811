"""Labels of a response's reasoning steps, as a row of pairs gives them: `labels`, and the steps' texts in `steps`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf_core.infra.errors import DataError, shortened

RIGHT = 1.0
"""Label of a step up to which the solution is right."""
WRONG = -1.0
"""Label of a step by which the solution has gone wrong."""
NO_LABEL = 0.0
"""Label of a step that its row doesn't judge; columns of labels are padded with it."""

_COLUMNS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "labels": (lambda value: value in (0, 1), "true and false", "label"),
    "steps": (lambda value: isinstance(value, str), "texts", "text"),
}
"""Columns with one entry per step: which entries are valid, what they are called together, and one of them."""


def read_step_labels(
    record: Mapping[str, Any], response: int, steps: int, *, truncated: bool, separator: str, place: Callable[[], str]
) -> list[float] | None:
    """Return `RIGHT`, `WRONG` or `NO_LABEL` for each step of a response; None where its row has no labels.

    Args:
        record: the row's columns. `labels` and `steps` are optional, each a list for the chosen response and one for the
            rejected.
        response: 0 for the chosen response, 1 for the rejected one.
        steps: how many steps of the response the separator finds.
        truncated: whether the response's end is missing. Its first steps keep their labels; the last may be half a step and gets
            `NO_LABEL`.
        separator: text that ends a step, for messages.
        place: returns the place of the row, for messages.

    Raises:
        DataError: a column is not two lists of valid entries, or has another number of entries than there are steps.
    """
    name = ("chosen", "rejected")[response]
    given = {column: both[response] for column in _COLUMNS if (both := _both_lists(record, column, place)) is not None}
    for column, entries in given.items():
        if len(entries) != steps and not truncated:
            raise DataError(
                f"`{column}` has {len(entries)} entries for the {steps} steps of `{name}`",
                place=place(),
                got=f"steps that end with {separator!r}",
                fix=f"give one {_COLUMNS[column][2]} per step, or set `separator` to what ends a step in these texts",
            )
    if (labels := given.get("labels")) is None:
        return None
    if len(labels) != len(texts := given.get("steps", labels)):
        raise DataError(
            f"`labels` has {len(labels)} entries for the {len(texts)} `steps` of `{name}`",
            place=place(),
            fix="give one label per step",
        )
    found = [RIGHT if label else WRONG for label in labels]
    if truncated:
        return [*found[: steps - 1], NO_LABEL] if len(found) >= steps else [NO_LABEL] * steps
    return found


def _both_lists(record: Mapping[str, Any], column: str, place: Callable[[], str]) -> list[list[Any]] | None:
    """Return a column's lists for the chosen and the rejected response; None where the row doesn't have the column."""
    given = record.get(column)
    if given is None:
        return None
    is_valid, entries, _ = _COLUMNS[column]
    shape = isinstance(given, list) and len(given) == 2 and all(isinstance(part, list) for part in given)
    if not shape or not all(is_valid(value) for part in given for value in part):
        raise DataError(
            f"`{column}` must be two lists of {entries}, for chosen and rejected", place=place(), got=shortened(given)
        )
    return given
