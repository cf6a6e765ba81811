"""Rows → token ids: one encoder for map-style and streaming data, for text and chat.

A prompt's ids never depend on its response: the two are encoded apart, exactly as a sampler would meet them. The mask says
which response tokens are learnt, the one that ends a turn included. No id is ever compared with a padding id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.data.checks import Checker, Example
from rlhf_core.data.examples import in_loss
from rlhf_core.data.files import Row
from rlhf_core.data.shapes import Format
from rlhf_core.data.templates import ChatTemplate, Piece
from rlhf_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_start", "keep_end", "drop"]

NO_ROOM = "the prompt leaves no response token"
TOO_LONG = "longer than max_length"
EQUAL = "chosen equals rejected"

# Text to put before what continues a text: a newline merges with the least, but some tokenizers drop it.
_ANCHORS = ("\n", "=", ".", "a")


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as token ids."""

    index: int
    prompt_ids: list[int]
    """At least one id."""
    responses: list[list[int]] = field(default_factory=list)
    masks: list[list[bool]] = field(default_factory=list)
    """For each response token, whether it is learnt; at least one in each response is."""
    per_prompt: dict[str, float] = field(default_factory=dict)
    per_response: dict[str, list[bool]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of its responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row: encoded, or refused with a reason."""

    place: str
    row: EncodedRow | None
    refused: str | None = None
    truncated: bool = False
    control_text: bool = False
    """Whether its text holds what looks like a control token. It was encoded as text."""
    left_out: tuple[str, ...] = ()
    read_as: str | None = None
    """What was taken for what; see `checks.Example`."""
    unused: tuple[str, ...] = ()


@dataclass(slots=True)
class _Plan:
    example: Example
    prompt: list[Piece]
    responses: list[list[Piece]]
    control_text: bool


class Encoder:
    """Turns rows of one record contract into token ids.

    Text prompts are encoded as they are, after the tokenizer's own beginning token where it adds one; text responses get
    the end token. Chat messages are rendered by the chat template, which alone says where control tokens stand.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        record: str,
        *,
        max_length: int = 1024,
        truncation: Truncation = "keep_start",
        chat_template: str | None = None,
        columns: dict[str, str] | None = None,
        format: Format = "auto",
        ignored: Sequence[str] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "the tokenizer is not a fast one", place=type(tokenizer).__name__, fix="use its fast version"
            )
        self.tokenizer, self.record = tokenizer, record
        self.max_length, self.truncation = max_length, truncation
        self.checker = Checker(record, columns, format=format, ignored=ignored)
        self.template = ChatTemplate(tokenizer, chat_template)
        self.begin = self._begin_ids()
        self._anchors = self._find_anchors()

    def encode(self, rows: Sequence[Row]) -> list[Outcome]:
        """Return what becomes of each row, in order. The tokenizer is called once or twice for all of them.

        Raises:
            DataError: a row breaks its contract.
            ModelError: the tokenizer lacks what the rows need (a chat template, an end token).
        """
        plans = [self._plan(self.checker.check(row)) for row in rows]
        pieces = [piece for plan in plans for group in (plan.prompt, *plan.responses) for piece in group]
        ids = iter(self._ids(pieces))
        outcomes = []
        for plan in plans:
            prompt = [token for _ in plan.prompt for token in next(ids)]
            responses, masks = [], []
            for group in plan.responses:
                parts = [(next(ids), piece.learnt) for piece in group]
                responses.append([token for part, _ in parts for token in part])
                masks.append([learnt for part, learnt in parts for _ in part])
            outcomes.append(self._outcome(plan, prompt, responses, masks))
        return outcomes

    def _plan(self, example: Example) -> _Plan:
        control, prompt = self.template.control, example.prompt
        if isinstance(prompt, str):
            answers = [text for text in example.responses if isinstance(text, str)]
            seen = any(map(control.within, [prompt, *answers]))
            end = self._end_piece(example) if answers else None
            # A response continues its prompt: what marks a text's beginning (Llama's `▁`) stands at the prompt's alone.
            pieces = [[Piece(text, learnt=True, continues=bool(prompt)), end] for text in answers if end]
            return _Plan(example, [Piece(ids=self.begin), Piece(prompt)], pieces, seen)
        chats = [messages for messages in example.responses if not isinstance(messages, str)]
        texts = [turn["content"] for messages in (prompt, *chats) for turn in messages]
        seen = any(map(control.within, texts))
        if not chats:
            return _Plan(example, self.template.prompt(prompt, example.place), [], seen)
        both = [
            self.template.turns(
                [*prompt, *messages],
                [number for number, turn in enumerate(messages, len(prompt)) if in_loss(turn)],
                example.place,
                also=texts,
            )
            for messages in chats
        ]
        return _Plan(example, both[0][0], [turns for _, turns in both], seen)

    def _end_piece(self, example: Example) -> Piece:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end token, so a response could not be ended",
                place=example.place,
                fix="set the tokenizer's `eos_token`",
            )
        return Piece(ids=(self.tokenizer.eos_token_id,), learnt=True)

    def _ids(self, pieces: Sequence[Piece]) -> list[Sequence[int]]:
        ids: list[Sequence[int]] = [piece.ids for piece in pieces]
        for literal in (False, True):
            for continues in (False, True):
                which = [
                    number
                    for number, piece in enumerate(pieces)
                    if piece.text and piece.literal is literal and piece.continues is continues
                ]
                texts = [pieces[number].text for number in which]
                tokenize = self._continued if continues and self._anchors else self._tokenize
                for number, tokens in zip(which, tokenize(texts, literal=literal), strict=True):
                    ids[number] = tokens
        return ids

    def _tokenize(self, texts: list[str], *, literal: bool) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=literal,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _begin_ids(self) -> tuple[int, ...]:
        """Return what the tokenizer itself puts before a text."""
        bare = self._tokenize(["a"], literal=True)[0]
        full = self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        return ()

    def _find_anchors(self) -> list[tuple[str, list[int]]]:
        """Return texts (and their ids) to put before a piece that continues another, best first, for tokenizers that mark a
        text's beginning; none for others.
        """
        found = []
        for text in _ANCHORS:
            anchor, piece, joined = self._tokenize([text, "a", f"{text}a"], literal=True)
            if anchor and joined[: len(anchor)] == anchor:
                if joined[len(anchor) :] == piece:
                    return []
                found.append((text, anchor))
        return found

    def _continued(self, texts: list[str], *, literal: bool) -> list[list[int]]:
        """Encode texts that stand behind others: without the mark of a text's beginning."""
        found: list[list[int] | None] = [None] * len(texts)
        for anchor, ids in self._anchors:
            left = [number for number, tokens in enumerate(found) if tokens is None]
            for number, tokens in zip(
                left, self._tokenize([anchor + texts[n] for n in left], literal=literal), strict=True
            ):
                # Where the anchor has merged with the text, another one may not.
                if tokens[: len(ids)] == ids:
                    found[number] = tokens[len(ids) :]
        left = [number for number, tokens in enumerate(found) if tokens is None]
        for number, tokens in zip(left, self._tokenize([texts[n] for n in left], literal=literal), strict=True):
            found[number] = tokens
        return [tokens for tokens in found if tokens is not None]

    def _outcome(self, plan: _Plan, prompt: list[int], responses: list[list[int]], masks: list[list[bool]]) -> Outcome:
        example = plan.example
        if not prompt:
            prompt = [self._stand_in(example)]
        for response, mask in zip(responses, masks, strict=True):
            if not any(mask):
                raise DataError("a response has no token", place=example.place, got=f"{len(response)} tokens")
        reason, truncated = None, False
        if len(prompt) + max(map(len, responses), default=1) > self.max_length:
            cut = self._cut(prompt, responses, masks)
            if isinstance(cut, str):
                reason = cut
            else:
                (prompt, responses, masks), truncated = cut, True
        if reason is None and self.record == "preference" and responses[0] == responses[1]:
            reason = EQUAL
        row = None
        if reason is None:
            row = EncodedRow(
                example.index, prompt, responses, masks,
                dict(example.per_prompt), dict(example.per_response), dict(example.record),
            )  # fmt: skip
        return Outcome(
            example.place, row, reason, truncated and row is not None, plan.control_text,
            example.left_out, example.read_as, example.unused,
        )  # fmt: skip

    def _stand_in(self, example: Example) -> int:
        """Return the token that stands for an empty prompt: the beginning token, else the end token."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ModelError(
            "the prompt is empty, and the tokenizer has neither a beginning nor an end token to stand for it",
            place=example.place,
            fix="set the tokenizer's `bos_token`, or give the row a prompt",
        )

    def _cut(
        self, prompt: list[int], responses: list[list[int]], masks: list[list[bool]]
    ) -> tuple[list[int], list[list[int]], list[list[bool]]] | str:
        """Cut to `max_length` by the policy; the reason instead where nothing learnt would be left."""
        if self.truncation == "drop":
            return TOO_LONG
        if self.truncation == "keep_start":
            room = self.max_length - len(prompt)
            if room < 1:
                return NO_ROOM
            masks = [mask[:room] for mask in masks]
            return (prompt, [response[:room] for response in responses], masks) if all(map(any, masks)) else NO_ROOM
        kept = self.begin if tuple(prompt[: len(self.begin)]) == self.begin else ()
        room = self.max_length - max(map(len, responses), default=1) - len(kept)
        if room >= 1:
            return [*kept, *prompt[-room:]], responses, masks
        return self._cut_turns(kept, responses, masks)

    def _cut_turns(
        self, kept: tuple[int, ...], responses: list[list[int]], masks: list[list[bool]]
    ) -> tuple[list[int], list[list[int]], list[list[bool]]] | str:
        """Drop a conversation's earlier turns: what stands before the first turn that still fits whole is its prompt."""
        if len(responses) != 1:
            return TOO_LONG
        response, mask = responses[0], masks[0]
        first = max(1, len(response) - (self.max_length - len(kept)))
        for start in range(first + 1, len(response)):
            if mask[start] and not mask[start - 1]:
                return [*kept, *response[first:start]], [response[start:]], [mask[start:]]
        return TOO_LONG
