"""Labels of steps, and how well they are judged. Axes: P pairs, R = 2P responses, T response tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_core.plugin import Batch, DataError, shortened

RIGHT, WRONG, NO_LABEL = 1.0, -1.0, 0.0
"""Labels of steps as a column: padding, which is 0, has none."""


_COLUMNS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "labels": (lambda value: value in (0, 1), "true and false"),
    "steps": (lambda value: isinstance(value, str), "texts"),
}
"""Columns with an entry a step: which entries are taken, and what they are called."""


def row_labels(
    record: Mapping[str, Any], which: int, steps: int, *, cut: bool, separator: str, place: Callable[[], str]
) -> list[float] | None:
    """Return the labels of a response's steps; None where its row has none.

    Args:
        record: the row's columns, among which may be `labels` and `steps`, each a list for chosen and one for rejected.
        which: 0 for the chosen response, 1 for the rejected one.
        steps: as many as the separator makes of it.
        cut: whether its end is cut off. The steps that are left keep their labels, but the last may be half a step.
        place: what a message calls the row.

    Raises:
        DataError: a column isn't of that shape, or the numbers differ.
    """
    name = ("chosen", "rejected")[which]
    given = {column: part[which] for column in _COLUMNS if (part := _pair(record, column, place)) is not None}
    labels, texts = given.get("labels"), given.get("steps")
    for column, part in given.items():
        if len(part) != steps and not cut:
            what = "label" if column == "labels" else "text"
            raise DataError(
                f"`{column}` has {len(part)} entries for the {steps} steps of `{name}`",
                place=place(),
                got=f"steps that end with {separator!r}",
                fix=f"give a {what} a step, or set `separator` to what ends a step in these texts",
            )
    if labels is None:
        return None
    if texts is not None and len(labels) != len(texts):
        raise DataError(
            f"`labels` has {len(labels)} entries for the {len(texts)} `steps` of `{name}`",
            place=place(),
            fix="give a label a step",
        )
    found = [RIGHT if value else WRONG for value in labels]
    if cut:
        return [*found[: steps - 1], NO_LABEL] if len(found) >= steps else [NO_LABEL] * steps
    return found


def _pair(record: Mapping[str, Any], column: str, place: Callable[[], str]) -> list[list[Any]] | None:
    """Return a column's two lists, None where the row doesn't have it."""
    given = record.get(column)
    if given is None:
        return None
    fits, what = _COLUMNS[column]
    shape = isinstance(given, list) and len(given) == 2 and all(isinstance(part, list) for part in given)
    if not shape or not all(fits(value) for part in given for value in part):
        raise DataError(
            f"`{column}` must be two lists of {what}, for chosen and rejected", place=place(), got=shortened(given)
        )
    return given


def ranked(values: Tensor) -> tuple[Tensor, float]:
    """Return for each pair whether the chosen one has the larger value, ties counting half."""
    above, equal = values[:, 0] > values[:, 1], values[:, 0] == values[:, 1]
    return above.float() + 0.5 * equal.float(), len(values)


def step_metrics(batch: Batch, steps: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return how many labelled steps are judged rightly, and in how many solutions the first wrong step is found."""
    known = labels != NO_LABEL
    right = (steps > 0) == (labels == RIGHT)
    false, judged = first_wrong(labels == WRONG), first_wrong((steps <= 0) & known)
    whole = known.any(dim=1)
    has_error = (whole & (false >= 0)).float()
    clean = (whole & (false < 0)).float()

    def by_prompt(values: Tensor) -> Tensor:
        return torch.zeros(batch.num_prompts, device=values.device).index_add(0, batch.owner, values.float())

    return {
        "step_accuracy": (by_prompt((right & known).sum(dim=1)), by_prompt(known.sum(dim=1))),
        "first_error_found": (by_prompt((judged == false).float() * has_error), by_prompt(has_error)),
        "right_let_pass": (by_prompt((judged < 0).float() * clean), by_prompt(clean)),
    }


def first_wrong(wrong: Tensor) -> Tensor:
    """Return (R,) the first column where `wrong` (R, T) is set, −1 where none is."""
    return torch.where(wrong.any(dim=1), wrong.float().argmax(dim=1), -1)
