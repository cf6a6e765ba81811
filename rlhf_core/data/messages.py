"""Chat messages as data sets write them (`role` or `from`, `content` or `value` …) → messages with `role` and `content`.

A role has one name, content is text, and tool calls are mappings with decoded arguments; every other key is kept. Keys with the
value None are dropped, because Arrow adds them wherever another row has the key. Missing content becomes `NoContent`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rlhf_core.contracts.records import Message
from rlhf_core.data.row_values import check_sound
from rlhf_core.infra.errors import DataError, nearest, shortened

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
"""Name of a turn's author in the data → role. `call` is an assistant turn whose content is a tool call."""

_ROLE_KEYS = ("role", "from")
_SPEAKER_KEYS = ("speaker", "sender", "author")
"""Keys that give the role, but only where their value is the name of a role and not a person's."""
_CONTENT_KEYS = ("content", "value", "text", "utterance", "message")
_INSTEAD = ("tool_calls", "function_call", "function_calls", "reasoning_content", "reasoning", "thinking")
"""Keys that an assistant turn may have instead of content."""

_SWITCHES = ("train", "training", "loss")
"""Keys by which other tools' files say whether a turn is in the loss; read as `weight`."""

PAIRS = (
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
)
"""Keys of a question and of its answer, where each entry of a list is such a pair."""

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class NoContent(str):
    """The content of a turn that has none. It is empty text here; a chat template gets None, if it accepts that."""


def role_key(message: Mapping[Any, Any]) -> str | None:
    """Return the key that holds a message's role (`role`, `from`, `speaker` …), or None where this isn't a message."""
    named = next((key for key in _ROLE_KEYS if isinstance(message.get(key), str)), None)
    if named is not None:
        return named
    speakers = ((key, message.get(key)) for key in _SPEAKER_KEYS)
    return next((key for key, who in speakers if isinstance(who, str) and who.casefold() in ROLES), None)


def is_plain_message(message: Mapping[Any, Any]) -> bool:
    """Return whether a message uses the keys `role` and `content`, and no other names for them (`from`, `value` …)."""
    return role_key(message) == "role" and not any(
        key in message for key in _CONTENT_KEYS[1:] if "content" not in message
    )


def turns_of_columns(value: Any) -> Any:
    """Return messages that are columns (`{"role": ["user", …], "content": ["Hi", …]}`) as a list of messages, else the value.

    A feature `Sequence({"role": …, "content": …})` of `datasets` has this form.
    """
    if not isinstance(value, Mapping) or not any(isinstance(value.get(key), list) for key in _ROLE_KEYS):
        return value
    columns = {key: column for key, column in value.items() if column is not None}
    if not all(isinstance(column, list) for column in columns.values()) or len({*map(len, columns.values())}) > 1:
        return value
    return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]


def pair_keys(entry: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return the keys of a question and of its answer in an entry of a list, or None where it isn't such a pair."""
    if role_key(entry) is not None:
        return None
    return next(
        (pair for pair in PAIRS if all(isinstance(entry.get(key), str) for key in pair)),
        None,
    )


def read_messages(value: Any, name: str, place: str) -> list[Message]:
    """Return a column's messages, which may be a list of messages or of question-and-answer pairs, or a single message.

    Args:
        value: the column's value.
        name: the column's name, for messages.
        place: where its row is, for messages.

    Raises:
        DataError: it is none of these, or a message has no role, no content, or an unknown role.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise wrong_type(name, "a list of messages", value, place)
    if not value:
        raise DataError(f"`{name}` has no messages", place=place, fix="fill it, or delete the row")
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
    """Return one message with `role` and `content`. `where` is its name in error messages, such as `messages[2]`."""
    present = {key: without_nulls(item) for key, item in entry.items() if item is not None}
    who = role_key(present)
    if who is None:
        raise _lacking("role", (*_ROLE_KEYS, *_SPEAKER_KEYS), entry, where, place)
    role = ROLES.get(present[who].casefold())
    if role is None:
        fix = f"use {', '.join(dict.fromkeys(ROLES.values()))}".replace(", call", "")
        raise DataError(f"`{where}.{who}` is unknown", place=place, got=shortened(present[who]), fix=fix)
    key = next((key for key in _CONTENT_KEYS if key in present), None)
    if key is None and not (role == "assistant" and any(present.get(other) for other in _INSTEAD)):
        raise _lacking("content", _CONTENT_KEYS, entry, where, place)
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


def _lacking(what: str, keys: Sequence[str], entry: Mapping[str, Any], where: str, place: str) -> DataError:
    """Return the error for a message without `role` or `content`, which may be there and null.

    Args:
        keys: all names that it may have.
    """
    null = next((key for key in keys if key in entry and entry[key] is None), None)
    if null is not None:
        return DataError(f"`{where}.{null}` is null", place=place, fix="fill it, or delete the row")
    held = [str(key) for key, value in entry.items() if value is not None]
    near = nearest(what, [key for key in held if key not in (*_ROLE_KEYS, *_CONTENT_KEYS)])
    return DataError(
        f"`{where}` must have `role` and `content`",
        place=place,
        got=", ".join(held) or "no keys",
        fix=f"write `{what}` for `{near}`" if near else None,
    )


def read_text(value: Any, where: str, place: str) -> str:
    """Return content as text, where it is text or a list of parts `{"type": "text", "text": …}`.

    Raises:
        DataError: it is anything else, such as an image.
    """
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
    """Move content that is a tool call (`{"name": …, "arguments": …}`, or a list of such, or its JSON) into `tool_calls`."""
    calls = _decoded(message["content"], where, place)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if isinstance(calls, list) and calls and all(isinstance(call, Mapping) and "name" in call for call in calls):
        message["content"] = NoContent()
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]


def _call(call: Mapping[str, Any], where: str, place: str) -> dict[str, Any]:
    """Return a tool call with its arguments decoded from JSON, since chat templates write them as JSON themselves."""
    function = call.get("function")
    inner = function if isinstance(function, Mapping) else call
    arguments = _decoded(inner.get("arguments"), f"{where}.arguments", place)
    if isinstance(arguments, Mapping):
        inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if isinstance(function, Mapping) else dict(inner)


def read_tools(value: Any, name: str, place: str) -> list[dict[str, Any]] | None:
    """Return a row's tools as a list of mappings, the form that chat templates take; None where it has none.

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
    # OpenAI's older `functions` have no `{"type": "function", "function": …}` around them.
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
    """Return text that holds a JSON object or array decoded, and anything else as it is."""
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
    """Return whether a text is a whole dialogue as Anthropic's HH data write it: `Human: …`, a blank line, `Assistant: …`."""
    begins = text[:100].lstrip().startswith("Human:")  # First, because it is cheap and called for every text.
    return begins and "Assistant" in _SPEAKER.findall(text)


def read_dialogue(text: str) -> list[Message]:
    """Return the messages of a text for which `is_dialogue` is true."""
    parts = _SPEAKER.split(f"\n\n{text.lstrip()}")
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def wrong_type(name: str, expected: str, got: Any, place: str) -> DataError:
    """Return the error for a column that holds a value of the wrong type."""
    number = isinstance(got, int | float) and expected.startswith("text")
    fix = "write it as text, in quotes" if number else None
    return DataError(f"`{name}` must be {expected}", place=place, got=f"{type(got).__name__} {shortened(got)}", fix=fix)
