"""Chat messages as people's files write them → messages with `role` and `content`, every other key kept.

Roles have one name each, content is text, tool calls are lists of mappings with their arguments decoded, and keys without a
value are gone: Arrow fills in None wherever another row has a key. Content that was missing stays known as such (`NoContent`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rlhf_core.contracts.records import Message
from rlhf_core.data.row_values import check_sound
from rlhf_core.infra.errors import DataError, shortened

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(
        (
            "tool",
            "ipython",
            "function",
            "observation",
            "environment",
            "function_response",
            "tool_response",
            "function-response",
        ),
        "tool",
    ),
    **dict.fromkeys(("function_call", "tool_call", "function-call"), "call"),
}
"""What a turn's author is called → its role. `call` is the assistant's, its content the call."""

_ROLE_KEYS = ("role", "from")
_SPEAKER_KEYS = ("speaker", "sender", "author")
"""Keys that say who speaks where they hold the name of a role, and not a person's."""
_CONTENT_KEYS = ("content", "value", "text", "utterance", "message")
_INSTEAD = ("tool_calls", "function_call", "function_calls", "reasoning_content", "reasoning", "thinking")
"""Keys that an assistant turn may have in place of content."""

_SWITCHES = ("train", "training", "loss")
"""Keys by which other tools say whether a turn is in the loss."""

PAIRS = (
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
)
"""Keys of a list's entries that each hold one question with its answer."""

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class NoContent(str):
    """The content of a turn that has none: empty text, which a chat template gets as None where it takes that."""


def role_key(message: Mapping[Any, Any]) -> str | None:
    """Return the key that says who speaks, or None where this is no message."""
    named = next((key for key in _ROLE_KEYS if isinstance(message.get(key), str)), None)
    if named is not None:
        return named
    speakers = ((key, message.get(key)) for key in _SPEAKER_KEYS)
    return next((key for key, who in speakers if isinstance(who, str) and who.casefold() in ROLES), None)


def is_plain_message(message: Mapping[Any, Any]) -> bool:
    """Tell whether a message has `role` and `content`, or what may stand in its place, rather than other names for them."""
    return role_key(message) == "role" and not any(
        key in message for key in _CONTENT_KEYS[1:] if "content" not in message
    )


def pair_keys(entry: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return the keys of a question and its answer, where a mapping has these two and no speaker."""
    if role_key(entry) is not None:
        return None
    return next(
        (pair for pair in PAIRS if all(isinstance(entry.get(key), str) for key in pair)),
        None,
    )


def read_messages(value: Any, name: str, place: str) -> list[Message]:
    """Return a column's messages: a list of them, of question-and-answer pairs, one alone, or the JSON of any.

    Raises:
        DataError: it is none of these, or a message lacks what it needs.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise wrong_type(name, "a list of messages", value, place)
    if not value:
        raise DataError(f"`{name}` has no messages", place=place)
    messages: list[Message] = []
    for number, entry in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(entry, Mapping):
            raise wrong_type(where, "a message with `role` and `content`", entry, place)
        pair = pair_keys(entry)
        if pair is not None:
            messages.append({"role": "user", "content": entry[pair[0]]})
            messages.append({"role": "assistant", "content": entry[pair[1]]})
        else:
            messages.append(_message(entry, where, place))
    return messages


def _message(entry: Mapping[str, Any], where: str, place: str) -> Message:
    present = {key: without_nulls(item) for key, item in entry.items() if item is not None}
    who = role_key(present)
    if who is None:
        got = ", ".join(map(str, present)) or "no keys"
        raise DataError(f"`{where}` must have `role` and `content`", place=place, got=got)
    role = ROLES.get(present[who].casefold())
    if role is None:
        fix = f"use {', '.join(dict.fromkeys(ROLES.values()))}".replace(", call", "")
        raise DataError(f"`{where}.{who}` is unknown", place=place, got=shortened(present[who]), fix=fix)
    key = next((key for key in _CONTENT_KEYS if key in present), None)
    if key is None and not (role == "assistant" and any(present.get(other) for other in _INSTEAD)):
        got = ", ".join(map(str, present))
        raise DataError(f"`{where}` must have `role` and `content`", place=place, got=got)
    content = NoContent() if key is None else read_text(present[key], f"{where}.{key}", place)
    rest = {name: item for name, item in present.items() if name not in (who, key)}
    message: dict[str, Any] = {"role": "assistant" if role == "call" else role, "content": content, **rest}
    if role == "call":
        _read_call(message, f"{where}.{key}", place)
    if "function_call" in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if "tool_calls" in message:
        calls = _decoded(message["tool_calls"], f"{where}.tool_calls", place)
        message["tool_calls"] = [
            _call(call, f"{where}.tool_calls", place) for call in _mappings(calls, f"{where}.tool_calls", place)
        ]
    for name in _SWITCHES:
        if isinstance(message.get(name), bool):
            message["weight"] = float(message.pop(name))
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(
            f"`{where}.weight` must be 0 or 1", place=place, got=shortened(weight), fix="0 keeps a turn out of the loss"
        )
    return cast(Message, message)


def read_text(value: Any, where: str, place: str) -> str:
    """Return a content's text: text, or parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise wrong_type(where, "text", value, place)
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"`{where}[{number}]` must be a part of text",
                place=place,
                got=f"a part of type {shortened(kind)}" if kind not in (None, "text") else shortened(part),
                fix="only text can be read: leave other parts out",
            )
        texts.append(part["text"])
    return "".join(texts)


def _read_call(message: dict[str, Any], where: str, place: str) -> None:
    """Make a turn whose content is a call (`{"name": …, "arguments": …}`, or a list of them) one with `tool_calls`."""
    calls = _decoded(message["content"], where, place)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if isinstance(calls, list) and calls and all(isinstance(call, Mapping) and "name" in call for call in calls):
        message["content"] = NoContent()
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]


def _call(call: Mapping[str, Any], where: str, place: str) -> dict[str, Any]:
    """Decode the arguments of a call, which templates write as JSON themselves."""
    function = call.get("function")
    inner = function if isinstance(function, Mapping) else call
    arguments = _decoded(inner.get("arguments"), f"{where}.arguments", place)
    if isinstance(arguments, Mapping):
        inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if isinstance(function, Mapping) else dict(inner)


def read_tools(value: Any, name: str, place: str) -> list[dict[str, Any]] | None:
    """Return a row's tools as mappings, in the form that chat templates take; None where it has none.

    Raises:
        DataError: they are neither a list of mappings nor the JSON of one.
    """
    value = _decoded(value, name, place)
    if (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list | tuple) and not value)
    ):
        return None
    value = [value] if isinstance(value, Mapping) else value
    items = [_decoded(item, name, place) for item in value] if isinstance(value, list | tuple) else value
    tools = _mappings(without_nulls(items), name, place)
    # A function that stands bare, as OpenAI's older `functions` did.
    return [
        tool
        if "function" in tool or "type" in tool or "parameters" not in tool
        else {"type": "function", "function": tool}
        for tool in tools
    ]


def _mappings(value: Any, name: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise wrong_type(name, "a list of mappings, or the JSON of one", value, place)
    return [dict(item) for item in value]


def _decoded(value: Any, where: str, place: str) -> Any:
    """Return what a text of JSON holds; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    check_sound({where: decoded}, place)
    return decoded


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that hold None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def is_dialogue(text: str) -> bool:
    """Tell whether a text is a whole dialogue: `Human: …`, a blank line, `Assistant: …`, and so on."""
    begins = text[:100].lstrip().startswith("Human:")  # Looked at first: every text of every row comes by here.
    return begins and "Assistant" in _SPEAKER.findall(text)


def read_dialogue(text: str) -> list[Message]:
    """Return the messages of a text that `is_dialogue`."""
    parts = _SPEAKER.split(f"\n\n{text.lstrip()}")
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def wrong_type(name: str, expected: str, got: Any, place: str) -> DataError:
    """Return the fault of a column that holds another type than it should."""
    return DataError(f"`{name}` must be {expected}", place=place, got=f"{type(got).__name__} {shortened(got)}")
