"""One row against its contract: the right columns, of the right types, with something to learn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from rlhf_core.data.files import Row
from rlhf_core.errors import ConfigError, DataError, did_you_mean, nearest, shortened
from rlhf_core.records import RECORDS, Label, Message, Prompt, RecordContract, Role

_ROLES = get_args(Role)
_LABELS = get_args(Label)

# What other data sets call a contract's columns; only ever used to suggest `dataset.columns`.
_SYNONYMS = {
    "prompt": ("question", "instruction", "input", "query", "problem", "text"),
    "response": ("answer", "output", "completion", "target", "solution"),
    "chosen": ("accepted", "preferred", "better", "positive"),
    "rejected": ("dispreferred", "worse", "negative"),
    "label": ("desirable", "score", "feedback"),
    "answer": ("solution", "final_answer", "target", "ground_truth"),
    "verifiable": ("is_verifiable",),
}


@dataclass(frozen=True, slots=True)
class Example:
    """A checked row, before it is encoded."""

    index: int
    place: str
    prompt: Prompt
    """The prompt; for a conversation all of its messages, each assistant turn of which is learnt."""
    responses: tuple[str, ...]
    conversation: bool = False
    per_prompt: Mapping[str, float] = field(default_factory=dict)
    per_response: Mapping[str, list[bool]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    """The columns that are kept for methods and rewards, as JSON values."""
    left_out: tuple[str, ...] = ()
    """Columns that are not JSON values and so are not kept."""


class Checker:
    """Checks rows against a record contract, with the data's own column names mapped to the contract's."""

    def __init__(self, record: str, columns: Mapping[str, str] | None = None) -> None:
        if record not in RECORDS:
            raise ConfigError(f"unknown record `{record}`", place="record", fix=did_you_mean(record, RECORDS))
        self.contract: RecordContract = RECORDS[record]
        self.columns = dict(columns or {})
        known = {*self.contract.required, *self.contract.optional}
        for name in self.columns:
            if name not in known:
                raise ConfigError(
                    f"the `{record}` contract has no column `{name}`",
                    place=f"dataset.columns.{name}",
                    fix=did_you_mean(name, known),
                )
        self._margin: bool | None = None
        self._complete = False
        """Whether a row before had every column."""

    def check(self, row: Row) -> Example:
        """Return the row's parts.

        Raises:
            DataError: a column is missing, of the wrong type, not finite, or empty.
        """
        values = {**row.values}
        for name, own in self.columns.items():
            if own in values:
                values[name] = row.values[own]
                if own not in self.columns:
                    values.pop(own, None)
            else:
                values.pop(name, None)
        for name, value in values.items():
            _finite(value, name, row.place)
        conversation = self._is_conversation(values, row)
        used = {"messages"} if conversation else {"prompt", *self.contract.responses}
        for name in self.contract.required:
            if not conversation and values.get(name) is None:
                raise self._missing(name, row)
        self._complete = self._complete or not conversation
        prompt = _messages(values["messages"], "messages", row) if conversation else _prompt(values["prompt"], row)
        if conversation:
            _whole_conversation(prompt, row)  # type: ignore[arg-type]
        responses = (
            () if conversation else tuple(_response(values[name], name, row) for name in self.contract.responses)
        )
        per_prompt, per_response = self._columns(values, row)
        used |= {*per_prompt, *(("label",) if per_response else ())}
        if not self.contract.responses:
            used.discard("prompt")  # A reward needs the prompt as it stood in the data.
        rest = {name: value for name, value in values.items() if name not in used}
        kept = {name: value for name, value in rest.items() if _is_json(value)}
        left_out = tuple(name for name in rest if name not in kept)
        return Example(row.index, row.place, prompt, responses, conversation, per_prompt, per_response, kept, left_out)

    def _is_conversation(self, values: Mapping[str, Any], row: Row) -> bool:
        if "messages" not in self.contract.optional or values.get("messages") is None:
            return False
        if values.get("response") is not None:
            raise DataError(
                "has both `messages` and `response`", place=row.place, fix="keep the one that should be learnt"
            )
        return True

    def _columns(self, values: Mapping[str, Any], row: Row) -> tuple[dict[str, float], dict[str, list[bool]]]:
        per_prompt: dict[str, float] = {}
        per_response: dict[str, list[bool]] = {}
        if "margin" in self.contract.optional:
            margin = values.get("margin")
            if margin is not None:
                if isinstance(margin, bool) or not isinstance(margin, int | float):
                    raise _wrong_type("margin", "a number", margin, row)
                per_prompt["margin"] = float(margin)
            if self._margin is None:
                self._margin = margin is not None
            elif self._margin != (margin is not None):
                raise DataError(
                    "`margin` stands in some rows only", place=row.place, fix="give it in every row, or in none"
                )
        if "label" in self.contract.required:
            label = values["label"]
            if label not in _LABELS:
                raise _wrong_label(label, row)
            per_response["desirable"] = [label == "desirable"]
        if "verifiable" in self.contract.required:
            if not isinstance(values["verifiable"], bool):
                raise _wrong_type("verifiable", "true or false", values["verifiable"], row)
            if not isinstance(values["answer"], str | int | float):
                raise _wrong_type("answer", "text or a number", values["answer"], row)
        return per_prompt, per_response

    def _other_contract(self, columns: Sequence[str]) -> str | None:
        """Return the contract that these columns fulfil, where it has responses and isn't the one asked for."""
        fits = [
            c
            for c in RECORDS.values()
            if c.responses and c.name != self.contract.name and set(c.required) <= {*columns}
        ]
        # The one that asks for most: unpaired rows have what `sft` needs, too.
        return max(fits, key=lambda contract: len(contract.required)).name if fits else None

    def _missing(self, name: str, row: Row) -> DataError:
        own = self.columns.get(name, name)
        found = [str(key) for key, value in row.values.items() if value is not None]
        synonyms = [key for key in found if key.casefold() in _SYNONYMS.get(name, ())]
        taken = set(self.contract.required) | set(self.columns.values())
        free = [key for key in found if key not in taken]
        near = nearest(own, free) or next(iter(synonyms), None)
        fix = f"set `dataset.columns` to `{{{name}: {near or 'YOUR_COLUMN'}}}`"
        empty = own in row.values
        problem = (
            f"column `{own}` is null"
            if empty
            else f"no column `{own}`, which the `{self.contract.name}` contract needs"
        )
        if self._complete:
            fix = "the rows before have it: fill or delete this one"
        elif other := self._other_contract(found):
            fix = f"these look like `{other}` rows, for another method; or {fix}"
        return DataError(
            problem, place=row.place, got=f"columns {', '.join(found) or 'none'}", fix=None if empty else fix
        )


def _wrong_label(label: Any, row: Row) -> DataError:
    truth = isinstance(label, bool | int | float) and label in (0, 1)
    fix = 'write words for true and false: `"desirable" if row["label"] else "undesirable"`' if truth else None
    near = nearest(label, _LABELS) if isinstance(label, str) else None
    return DataError(
        "`label` must be `desirable` or `undesirable`",
        place=row.place,
        got=shortened(label),
        fix=f"did you mean `{near}`?" if near else fix,
    )


def _wrong_type(name: str, expected: str, got: Any, row: Row) -> DataError:
    shown = repr(got)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return DataError(f"`{name}` must be {expected}", place=row.place, got=f"{type(got).__name__} {shown}")


def _prompt(value: Any, row: Row) -> Prompt:
    if isinstance(value, str):
        return value
    messages = _messages(value, "prompt", row)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "the prompt ends on an assistant turn, which leaves nothing to answer",
            place=row.place,
            fix="end it on a user turn, and put the answer into its own column",
        )
    return messages


def _messages(value: Any, name: str, row: Row) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong_type(name, "text or a list of messages" if name == "prompt" else "a list of messages", value, row)
    if not value:
        raise DataError(f"`{name}` has no messages", place=row.place)
    messages: list[Message] = []
    for number, message in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(message, Mapping):
            raise _wrong_type(where, "a message with `role` and `content`", message, row)
        present = {key: item for key, item in message.items() if item is not None}
        if set(present) != {"role", "content"}:
            raise DataError(
                f"`{where}` must have `role` and `content` and nothing else",
                place=row.place,
                got=", ".join(map(str, present)) or "no keys",
            )
        role, content = present["role"], present["content"]
        if role not in _ROLES:
            raise DataError(
                f"`{where}.role` is unknown", place=row.place, got=repr(role), fix=f"use {', '.join(_ROLES)}"
            )
        if not isinstance(content, str):
            raise _wrong_type(f"{where}.content", "text", content, row)
        messages.append({"role": role, "content": content})
    return messages


def _whole_conversation(messages: list[Message], row: Row) -> None:
    last, first = messages[-1]["role"], messages[0]["role"]
    if last != "assistant":
        raise DataError(
            f"the conversation ends on a {last} turn, which nothing answers",
            place=row.place,
            fix="end it on an assistant turn, or leave the last turn out",
        )
    if first == "assistant":
        raise DataError("the conversation begins with an assistant turn, which answers nothing", place=row.place)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"`messages[{number}]` is an empty response", place=row.place, fix="fill or delete the row")


def _response(value: Any, name: str, row: Row) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, "text", value, row)
    if not value.strip():
        raise DataError(f"`{name}` is an empty response", place=row.place, fix="fill or delete the row")
    return value


def _finite(value: Any, name: str, place: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"`{name}` isn't finite", place=place, got=repr(value), fix="repair or delete the row")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _finite(item, f"{name}.{key}", place)
    elif isinstance(value, list | tuple):
        for item in value:
            _finite(item, name, place)


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, str | bool | int | float)
