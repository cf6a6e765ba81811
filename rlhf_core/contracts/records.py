"""The record types: what one line of a data file holds, by name.

A method names the record type of its rows (`Trainer.record`); the data layer checks each row against it and turns it into
token ids. Columns that a record type does not name are kept and reach the method and its rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation. Whatever other keys it has in the data stay with it and reach the chat template."""

    role: Role
    content: str
    """Empty where a turn is tool calls or reasoning alone."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    reasoning_content: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[float]
    """0 keeps an assistant's turn out of the loss."""


Prompt = str | list[Message]
"""A prompt is plain text, taken as it is, or chat messages, rendered by the model's chat template."""

Label = Literal["desirable", "undesirable"]


@dataclass(frozen=True)
class RecordType:
    """What a row of one record type holds.

    `required` and `optional` name columns; `responses` names the columns that hold text to train on or to score, in
    their order in a batch.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    responses: tuple[str, ...]
    summary: str


RECORDS: dict[str, RecordType] = {
    kind.name: kind
    for kind in (
        RecordType(
            "sft", ("prompt", "response"), ("messages", "text", "input", "system", "tools"), ("response",),
            "a prompt and the response to imitate; or `messages`, every assistant turn in the loss; or `text`, all in the loss",
        ),
        RecordType(
            "preference", ("prompt", "chosen", "rejected"), ("margin", "steps", "labels", "input", "system", "tools"),
            ("chosen", "rejected"),
            "a prompt with a better and a worse response",
        ),
        RecordType(
            "unpaired", ("prompt", "response", "label"), ("messages", "input", "system", "tools"), ("response",),
            "a prompt, a response, and whether it is `desirable` or `undesirable`",
        ),
        RecordType(
            "prompt", ("prompt",), ("input", "system", "tools"), (),
            "a prompt to answer; other columns reach the reward",
        ),
        RecordType(
            "reasoning", ("prompt", "answer", "verifiable"), ("input", "system", "tools"), (),
            "a prompt, its reference answer, and whether a verifier can check a response against it",
        ),
    )
}  # fmt: skip
