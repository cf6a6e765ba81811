"""The row contracts: what one line of a data file holds, by name.

A method names the contract that it eats (`Trainer.record`); the data layer checks each row against it and turns it into
token ids. Columns that a contract does not name are kept and reach the method and its rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


Prompt = str | list[Message]
"""A prompt is plain text, taken as it is, or chat messages, rendered by the model's chat template."""

Label = Literal["desirable", "undesirable"]


@dataclass(frozen=True)
class RecordContract:
    """What a row of one record type holds.

    `required` and `optional` name columns; `responses` names the columns that hold text to be learnt from or scored, in
    the order in which they stand in a batch.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    responses: tuple[str, ...]
    summary: str


RECORDS: dict[str, RecordContract] = {
    contract.name: contract
    for contract in (
        RecordContract(
            "sft", ("prompt", "response"), ("messages",), ("response",),
            "a prompt and the response to imitate; or `messages`, of which every assistant turn is learnt",
        ),
        RecordContract(
            "preference", ("prompt", "chosen", "rejected"), ("margin", "steps", "labels"), ("chosen", "rejected"),
            "a prompt with a better and a worse response",
        ),
        RecordContract(
            "unpaired", ("prompt", "response", "label"), (), ("response",),
            "a prompt, a response, and whether it is `desirable` or `undesirable`",
        ),
        RecordContract(
            "prompt", ("prompt",), (), (),
            "a prompt to answer; other columns reach the reward",
        ),
        RecordContract(
            "reasoning", ("prompt", "answer", "verifiable"), (), (),
            "a prompt, its reference answer, and whether a verifier can check a response against it",
        ),
    )
}  # fmt: skip
