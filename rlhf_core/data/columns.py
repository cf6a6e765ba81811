"""Columns of people's rows: the names that they bear, and the kinds of values that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rlhf_core.data.messages import is_dialogue, is_plain_message, pair_keys, role_key

# What other data sets call a column. Taken only where exactly one of them is there, with a value of the right kind.
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
"""Names of columns that belong to what is asked, numbers too."""

KNOWN = frozenset((*OTHER_NAMES, *(name for names in OTHER_NAMES.values() for name in names)))
"""Every name that a column of a row may be recognised by."""

HISTORY = ("history", "chat_history", "conversation_history")
"""Columns of turns that go before a prompt."""

CONVERSATIONS = frozenset(OTHER_NAMES["messages"])
"""Names of columns that hold a whole conversation."""

TURNS: tuple[Literal["sharegpt", "pairs", "messages"], ...] = ("sharegpt", "pairs", "messages")
CHATS: tuple[Literal["sharegpt", "pairs", "messages", "texts"], ...] = (*TURNS, "texts")
TEXT = ("text", "dialogue")


def value_kind(value: Any) -> str:
    """Return what kind of value a column holds.

    `text`, `dialogue` (a text of several speakers), `messages`, `sharegpt`, `pairs` (lists of turns), `turn` (one alone), `null`,
    `empty` (a list without entries), `texts` (a list of two and more), `number`, `list` or `other`.
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
    return name.casefold().replace(" ", "_").replace("-", "_")
