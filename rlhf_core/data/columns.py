"""Columns as data sets have them: the names that are in use, and the kinds of values that a column can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rlhf_core.data.messages import is_dialogue, is_plain_message, pair_keys, role_key

# Column of a record type → other names of it. One is taken only where no second one is there, and its value is of the right kind.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "problem", "input", "inputs", "user", "human"),
    "response": (
        "completion", "output", "outputs", "answer", "solution", "generated_solution", "target", "targets", "reply", "assistant",
        "bot",
    ),
    "chosen": ("chosen_response", "accepted", "preferred", "preferred_output", "better", "winner", "positive"),
    "rejected": ("rejected_response", "dispreferred", "non_preferred_output", "worse", "loser", "negative"),
    "label": ("desirable", "kto_tag"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "data"),
    "input": ("context",),
    "system": ("system_prompt", "system_message"),
    "tools": ("functions",),
}  # fmt: skip

ASKING = frozenset(("prompt", "input", "system", *OTHER_NAMES["prompt"], *OTHER_NAMES["input"], *OTHER_NAMES["system"]))
"""Names of columns that belong to the prompt, even where they hold numbers."""

KNOWN = frozenset((*OTHER_NAMES, *(name for names in OTHER_NAMES.values() for name in names)))
"""Every name by which a column can be recognised."""

HISTORY = ("history", "chat_history", "conversation_history")
"""Names of columns with earlier turns, which go before the prompt."""

CONVERSATIONS = frozenset(OTHER_NAMES["messages"])
"""Names of columns that hold a whole conversation."""

IDENTIFIERS = frozenset(("id", "_id", "uid", "uuid", "guid", "idx", "index", "key", "hash", "sha", "sha256", "md5"))
"""Names of columns that tell rows apart, and mean nothing else."""


def is_identifier(name: str) -> bool:
    """Return whether a column's name is that of an identifier of its row."""
    folded = folded_name(name.strip())
    return folded in IDENTIFIERS or folded.endswith(("_id", "_hash", "_index"))


TURNS: tuple[Literal["sharegpt", "pairs", "messages"], ...] = ("sharegpt", "pairs", "messages")
CHATS: tuple[Literal["sharegpt", "pairs", "messages", "texts"], ...] = (*TURNS, "texts")
TEXT = ("text", "dialogue")
# Kinds of values, see `value_kind`: lists of turns, those with lists of plain texts, and texts.


def value_kind(value: Any) -> str:
    """Return the kind of a column's value.

    `text`; `dialogue` (a text of `Human:` and `Assistant:`); `messages`, `sharegpt` or `pairs` (lists of turns); `turn` (a single
    message); `texts` (a list of two or more texts); `empty` (a list without entries); `list`; `number`; `null`; or `other`.
    """
    if isinstance(value, str):
        return "dialogue" if is_dialogue(value) else "text"
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return "number"
    if isinstance(value, Mapping):
        return "turn" if role_key(value) else "other"
    if not isinstance(value, list | tuple):
        return "other"
    if not value:
        return "empty"
    if not isinstance(value[0], Mapping):
        return "texts" if len(value) > 1 and all(isinstance(item, str) for item in value) else "list"
    if role_key(value[0]) is None:
        return "pairs" if pair_keys(value[0]) else "list"
    return "messages" if is_plain_message(value[0]) else "sharegpt"


def folded_name(name: str) -> str:
    """Return a column's name in lower case with `_` for blanks and hyphens, so that `System Prompt` is `system_prompt`."""
    return name.casefold().replace(" ", "_").replace("-", "_")
