"""Labels of unpaired rows as data sets write them: true or false, 1 or 0, or a word."""

from __future__ import annotations

from typing import Any

from rlhf_core.infra.errors import DataError, nearest, shortened

_LABELS = {
    **dict.fromkeys(
        ("desirable", "true", "t", "1", "+1", "yes", "y", "good", "positive", "chosen", "accepted", "accept", "preferred",
         "thumbs_up", "thumbsup", "up", "upvote", "like", "liked", "correct", "👍"), True,
    ),
    **dict.fromkeys(
        ("undesirable", "false", "f", "0", "-1", "no", "n", "bad", "negative", "rejected", "reject", "dispreferred",
         "thumbs_down", "thumbsdown", "down", "downvote", "dislike", "disliked", "incorrect", "👎"), False,
    ),
}  # fmt: skip


def label_of(value: Any) -> bool | None:
    """Return a label as true (desirable) or false; None where it is neither a boolean, nor 1 or 0, nor a word that is known."""
    if not isinstance(value, str | bool | int | float):
        return None
    text = str(value).strip().casefold().replace(" ", "_").replace("thumbs-", "thumbs_").removesuffix(".0")
    return _LABELS.get(text)


def read_label(value: Any, name: str, place: str) -> bool:
    """Return a label as true (desirable) or false.

    Args:
        value: the column's value.
        name: the column's name, for messages.
        place: where its row is, for messages.

    Raises:
        DataError: it isn't a label.
    """
    label = label_of(value)
    if label is not None:
        return label
    near = nearest(value, ("desirable", "undesirable")) if isinstance(value, str) else None
    fix = f"did you mean `{near}`?" if near else None
    if isinstance(value, int | float):
        fix = "say from which score on an answer is good, and write that as the label"
    raise DataError(
        f"`{name}` must be `desirable` or `undesirable`, true or false, 1 or 0",
        place=place,
        got=shortened(value),
        fix=fix,
    )
