"""Rows → token ids, for map-style and streaming data, for text and chat.

A prompt's ids never depend on its response: the two are encoded separately, so a sampler encodes the same prompt alike. The loss
mask says which response tokens are in the loss, those that end a turn included. No id is ever compared with the padding id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contracts.records import Message, Prompt
from rlhf_core.data.chat_rendering import ChatTemplate, texts_in
from rlhf_core.data.prompt_responses import in_loss
from rlhf_core.data.row_checker import CheckedRow, RowChecker
from rlhf_core.data.row_shapes import Format
from rlhf_core.data.row_source import Row
from rlhf_core.data.row_values import as_json
from rlhf_core.data.text_options import TextOptions
from rlhf_core.data.text_spans import TextSpan, TextSpanEncoder
from rlhf_core.data.turns import UNUSED_TOOLS, ignores_tools, split_turns
from rlhf_core.infra.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.config.training import DatasetConfig

Truncation = Literal["keep_start", "keep_end", "drop"]
Wrap = Literal["none", "chat"]

NO_ROOM = "the prompt leaves no response token"
TOO_LONG = "longer than max_length"
EQUAL = "chosen equals rejected"

PLAIN = (
    "the rows are plain text, and the model's chat template isn't applied to them: `dataset.wrap: chat` makes a prompt the"
    " user's turn and a response the assistant's, `none` keeps them as they are"
)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as token ids."""

    index: int
    """Number of the row in the data, from 0."""
    prompt_ids: list[int]
    """Token ids of the prompt, at least one."""
    responses: list[list[int]] = field(default_factory=list)
    """Token ids of each response: one, a pair (chosen, rejected), or none where completions are to be sampled."""
    masks: list[list[bool]] = field(default_factory=list)
    """Loss mask of each response, one value per token; at least one token of each response is in the loss."""
    per_prompt: dict[str, float] = field(default_factory=dict)
    """Columns with one number per prompt (`margin`)."""
    per_response: dict[str, list[bool]] = field(default_factory=dict)
    """Columns with one value per response (`desirable`)."""
    prompt: Prompt = ""
    """The prompt as it is in the data: text, or chat messages."""
    record: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, as JSON values."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of its responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """The result of encoding one row: its token ids, or the reason why it was refused, and what to report of it."""

    place: str
    """Where the row is, for messages: `file:line`."""
    row: EncodedRow | None
    """None where the row was refused."""
    refused: str | None = None
    """Why the row was refused."""
    truncated: bool = False
    """Whether the row was truncated to `max_length`."""
    control_text: tuple[str, ...] = ()
    """Texts of control tokens in the row, which were encoded as text."""
    left_out: tuple[str, ...] = ()
    """Columns whose values aren't JSON values, so they don't reach rewards and methods."""
    read_as: str | None = None
    """Description of which column was read as what; None where all have the record type's names."""
    unused: tuple[str, ...] = ()
    """Columns of text, turns or images that aren't used."""
    notes: tuple[str, ...] = ()
    """Other warnings."""
    lost: tuple[str, ...] = ()
    """Warnings on what the chat template doesn't render."""
    set_aside: tuple[str, ...] = ()
    """Warnings on turns that are kept out of the loss because no question precedes them, or no answer follows."""
    absent: tuple[tuple[str, str, str | None], ...] = ()
    """Columns that `dataset.columns` names and the row lacks; see `CheckedRow`."""
    tokens: int = 0
    """Tokens of the prompt with its longest response, before the row was truncated or refused."""
    entry: str | None = None
    """Name of the entry of `data` that the row is of, where there are several."""
    again: bool = False
    """Whether the row was counted before: a mixture reads a small part several times."""


@dataclass(slots=True)
class _RowSpans:
    """A row as spans of text, before these are encoded."""

    checked: CheckedRow
    prompt: list[TextSpan]
    responses: list[list[TextSpan]]
    control_text: list[str]
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class Encoder:
    """Encodes rows of one record type.

    A text prompt is encoded as it is, after the beginning token where the tokenizer adds one; a text response continues it and
    gets the end token. Chat messages are rendered by the chat template, which writes all control tokens.

    Args:
        tokenizer: a fast tokenizer.
        record: name of the record type.
        max_length: most tokens in a prompt with its longest response.
        truncation: what happens to longer rows; see `dataset.truncation`.
        chat_template: text of a template, or path of its file, that replaces the tokenizer's.
        columns, format, ignored: `dataset.columns`, `dataset.format` and `dataset.ignore_columns`; see `RowChecker`.
        wrap: `chat` makes a text prompt the user's turn; None takes what is saved with the tokenizer, else `none`.
        special_tokens: control tokens that data may use; None takes those saved with the tokenizer, else none.
        turns: `each` makes a row of every assistant turn.
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
        wrap: Wrap | None = None,
        special_tokens: Sequence[str] | None = None,
        turns: Literal["together", "each"] = "together",
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "the tokenizer is not a fast one", place=type(tokenizer).__name__, fix="use its fast version"
            )
        if turns == "each" and record != "sft":
            raise ConfigError(
                f"rows of `{record}` have no turns to be trained separately",
                place="dataset.turns",
                got=turns,
                fix="leave it out",
            )
        self.tokenizer, self.record, self.turns = tokenizer, record, turns
        self.max_length, self.truncation = max_length, truncation
        self.checker = RowChecker(record, columns, format=format, ignored=ignored)
        kept = TextOptions.saved_with(tokenizer)
        self.wrap = kept.wrap if wrap is None else wrap
        self.allowed = tuple((kept.special_tokens if special_tokens is None else special_tokens) or ())
        """The control tokens that data may use."""
        self.template = ChatTemplate(tokenizer, chat_template, allowed=self.allowed)
        self.text_spans = TextSpanEncoder(tokenizer)
        self.chats = False
        """Whether any row so far was a chat."""
        self.wrapped = False
        """Whether any text prompt so far was made the user's turn."""
        self.plain = False
        """Whether any row so far was plain text, there is a chat template, and `dataset.wrap` doesn't say whether to use it."""

    @classmethod
    def with_options(
        cls, tokenizer: PreTrainedTokenizerBase, record: str, options: DatasetConfig, max_length: int
    ) -> Encoder:
        """Return the encoder for rows of a record type under a run's `dataset` options."""
        return cls(
            tokenizer,
            record,
            max_length=max_length,
            truncation=options.truncation,
            chat_template=options.chat_template,
            columns=options.columns,
            format=options.format,
            ignored=options.ignore_columns,
            wrap=options.wrap,
            special_tokens=options.special_tokens,
            turns=options.turns,
        )

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase, options: DatasetConfig) -> Encoder | None:
        """Return this encoder, with what it saw so far, for another tokenizer; None if that may give a row other ids.

        Args:
            options: what this encoder was made with.
        """
        other = Encoder.with_options(tokenizer, self.record, options, self.max_length)
        if (same := other.identity()) is None or same != self.identity():
            return None
        other.load_state_dict(self.state_dict())
        other.checker = self.checker
        return other

    def state_dict(self) -> dict[str, bool]:
        """Return which kinds of rows were encoded so far, as JSON values."""
        return {"chats": self.chats, "wrapped": self.wrapped, "plain": self.plain}

    def absorb(self, state: Mapping[str, bool]) -> None:
        """Add which kinds of rows another encoder encoded."""
        self.chats, self.wrapped, self.plain = (
            self.chats or state["chats"], self.wrapped or state["wrapped"], self.plain or state["plain"],
        )  # fmt: skip

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Restore what `state_dict` returned, where the same rows are loaded instead of encoded."""
        self.chats, self.wrapped, self.plain = state["chats"], state["wrapped"], state["plain"]

    def identity(self) -> dict[str, Any] | None:
        """Return what determines the ids of a row, apart from the row, the options and the code: a content fingerprint of the
        tokenizer and the chat template, as JSON values.

        None where there is none: the tokenizer's class isn't one of transformers, parts of it are written in Python, or the chat
        template writes a time that differs from run to run.
        """
        tokenizer, times = self.tokenizer, self.template.times()
        if times is None or not type(tokenizer).__module__.startswith("transformers."):
            return None
        try:
            written = tokenizer.backend_tokenizer.to_str()
        except Exception:  # A part of it is written in Python.
            return None
        return {
            "record": self.record,
            "max_length": self.max_length,
            "wrap": self.wrap,
            "tokenizer": hashlib.sha256(written.encode()).hexdigest(),
            "tokenizer_class": type(tokenizer).__qualname__,
            "control_tokens": {name: number for name, (number, _) in self.template.control.tokens.items()},
            "allowed": sorted(self.allowed),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
            "begin": list(self.text_spans.begin),
            "templates": [self.template.source, self.template.with_tools],
            "times": times,
        }

    def encode(self, rows: Sequence[Row]) -> list[RowOutcome]:
        """Return the outcomes of rows in order, with `turns: each` several per row. All rows share a few calls of the tokenizer.

        Raises:
            DataError: a row isn't what its record type needs.
            ModelError: the tokenizer lacks what the rows need (a chat template, an end token).
        """
        return [outcome for group in self.encode_each(rows) for outcome in group]

    def encode_each(self, rows: Sequence[Row]) -> list[list[RowOutcome]]:
        """Return a list of outcomes for each row: one, or with `turns: each` one per assistant turn."""
        plans = [[self._plan(checked) for checked in self._checked_rows(row)] for row in rows]
        flat = [plan for group in plans for plan in group]
        spans = [span for plan in flat for group in (plan.prompt, *plan.responses) for span in group]
        ids = iter(self.text_spans(spans))
        return [[self._encoded(plan, ids) for plan in group] for group in plans]

    def _encoded(self, plan: _RowSpans, ids: Iterator[Sequence[int]]) -> RowOutcome:
        """Return the outcome for a row. `ids` yields those of its spans, in order."""
        prompt = [token for _ in plan.prompt for token in next(ids)]
        responses, masks = [], []
        for group in plan.responses:
            parts = [(next(ids), span.in_loss) for span in group]
            responses.append([token for part, _ in parts for token in part])
            masks.append([in_loss for part, in_loss in parts for _ in part])
        return self._outcome(plan, prompt, responses, masks)

    def _checked_rows(self, row: Row) -> list[CheckedRow]:
        """Check a row; return it, or with `turns: each` one row per assistant turn."""
        checked = self._wrapped(self.checker.check(row))
        if isinstance(checked.prompt, str) or self.turns == "together" or not checked.responses:
            return [checked]
        messages = [*checked.prompt, *checked.responses[0]]
        each = [
            replace(
                checked, prompt=messages[:number], responses=([message],), asked=self._asked(checked, messages[:number])
            )
            for number, message in enumerate(messages)
            if number >= len(checked.prompt) and in_loss(message)
        ]
        return each or [checked]

    def _asked(self, checked: CheckedRow, prompt: list[Message]) -> Prompt:
        """Return the prompt of one turn of a conversation, as it is in the data."""
        return checked.asked if len(prompt) == len(checked.prompt) else as_json(prompt)

    def _wrapped(self, checked: CheckedRow) -> CheckedRow:
        """Return a row of text as chat messages, where `wrap` is `chat`; any other row as it is."""
        if not isinstance(checked.prompt, str) or not checked.prompt:
            return checked
        if self.wrap is None and self.template.source is not None:
            self.plain = True
        if self.wrap != "chat":
            return checked
        self.wrapped = True
        answers = [[Message(role="assistant", content=text)] for text in checked.responses if isinstance(text, str)]
        return replace(checked, prompt=[Message(role="user", content=checked.prompt)], responses=tuple(answers))

    def _plan(self, checked: CheckedRow) -> _RowSpans:
        """Return a row as spans of text: a chat as its template renders it."""
        if isinstance(checked.prompt, str):
            return self._text_plan(checked, checked.prompt)
        self.chats = True
        prompt, tools, place = checked.prompt, checked.tools, checked.place
        contents = [prompt, tools or [], *checked.responses]
        seen = [name for text in texts_in(contents) for name in self.template.control.within(text)]
        if not checked.responses:
            chat = self.template.chat(prompt, place, tools=tools)
            text = self.template.render(chat, answer=True)
            lost = [UNUSED_TOOLS] if ignores_tools(self.template, chat, text, answer=True) else []
            return _RowSpans(checked, self.template.control.rendered_spans(text, chat.mark), [], seen, lost=lost)
        both = []
        for messages in checked.responses:
            assert not isinstance(messages, str)
            numbers = [number for number, turn in enumerate(messages, len(prompt)) if in_loss(turn)]
            if not numbers:
                raise DataError("no turn of the answer is in the loss", place=place, fix="give one a `weight` of 1")
            # Messages after the last turn in the loss wouldn't be trained, and may change how a template renders that turn.
            chat = self.template.chat([*prompt, *messages][: numbers[-1] + 1], place, tools=tools, also=contents)
            both.append(split_turns(self.template, chat, numbers, answers_from=len(prompt)))
        if any(turns.prompt != both[0].prompt for turns in both):
            raise DataError(
                "the chat template renders the prompt differently for the two responses", place=place,
                fix="give responses of one turn each",
            )  # fmt: skip
        notes, lost = ([text for turns in both for text in getattr(turns, name)] for name in ("notes", "lost"))
        return _RowSpans(checked, both[0].prompt, [turns.response for turns in both], seen, notes, lost)

    def _text_plan(self, checked: CheckedRow, prompt: str) -> _RowSpans:
        """Return a row of plain text as spans, with beginning and end tokens."""
        control = self.template.control
        texts = [text for text in checked.responses if isinstance(text, str)]
        seen = [name for text in (prompt, *texts) for name in control.within(text)]
        # A response continues its prompt, so only the prompt gets the mark of a text's beginning (Llama's `▁`).
        answers = [control.spans_in_text(text, in_loss=True, continues=bool(prompt)) for text in texts]
        if not prompt:
            # Text without a prompt has the beginning token as its prompt, and must not begin with a second one.
            begin = self.text_spans.begin or (self._empty_prompt_id(checked),)
            answers = [answer[len(begin) :] if _begins_with(answer, begin) else answer for answer in answers]
        answers = [self._ended(answer, checked) for answer in answers]
        before = control.spans_in_text(prompt)
        if not _begins_with(before, self.text_spans.begin):
            before.insert(0, TextSpan(ids=self.text_spans.begin))
        lost = ["`tools` need a chat template, and the rows are plain text"] if checked.tools else []
        return _RowSpans(checked, before, answers, seen, lost=lost)

    def _ended(self, answer: list[TextSpan], checked: CheckedRow) -> list[TextSpan]:
        """Return a response with one end token after it, also where its text ends with that already."""
        end = self._end_span(checked)
        for length in (len(answer), len(answer) - 1):
            if length > 0 and answer[length - 1].ids == end.ids and not any(p.text.strip() for p in answer[length:]):
                return answer[:length]
        return [*answer, end]

    def _end_span(self, checked: CheckedRow) -> TextSpan:
        """Return the end token, in the loss."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end token, so a response could not be ended",
                place=checked.place,
                fix="set the tokenizer's `eos_token`",
            )
        return TextSpan(ids=(self.tokenizer.eos_token_id,), in_loss=True)

    def _outcome(
        self, plan: _RowSpans, prompt: list[int], responses: list[list[int]], masks: list[list[bool]]
    ) -> RowOutcome:
        """Return the outcome for a row of these ids and loss masks: truncated or refused where it is too long."""
        checked = plan.checked
        if not prompt:
            prompt = [self._empty_prompt_id(checked)]
        for response, mask in zip(responses, masks, strict=True):
            if not any(mask):
                raise DataError("a response has no token", place=checked.place, got=f"{len(response)} tokens")
        reason, truncated = None, False
        tokens = len(prompt) + max(map(len, responses), default=1)
        if tokens > self.max_length:
            shorter = self._truncated(prompt, responses, masks)
            if isinstance(shorter, str):
                reason = shorter
            else:
                (prompt, responses, masks), truncated = shorter, True
        if reason is None and self.record == "preference" and responses[0] == responses[1]:
            reason = EQUAL
        row = None
        if reason is None:
            row = EncodedRow(
                checked.index, prompt, responses, masks,
                dict(checked.per_prompt), dict(checked.per_response), checked.asked, dict(checked.record),
            )  # fmt: skip
        control, notes, lost = (tuple(dict.fromkeys(found)) for found in (plan.control_text, plan.notes, plan.lost))
        return RowOutcome(
            checked.place, row, reason, truncated and row is not None, control,
            checked.left_out, checked.read_as, checked.unused, notes, lost, checked.set_aside, checked.absent, tokens,
            checked.entry,
        )  # fmt: skip

    def _empty_prompt_id(self, checked: CheckedRow) -> int:
        """Return the id that an empty prompt is encoded as: the beginning token's, else the end token's."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ModelError(
            "the prompt is empty, and the tokenizer has neither a beginning nor an end token to encode it as",
            place=checked.place,
            fix="set the tokenizer's `bos_token`, or give the row a prompt",
        )

    def _truncated(
        self, prompt: list[int], responses: list[list[int]], masks: list[list[bool]]
    ) -> tuple[list[int], list[list[int]], list[list[bool]]] | str:
        """Truncate to `max_length` as `truncation` says.

        Returns:
            prompt, responses and masks; or the reason for refusing the row, where no token in the loss would be left.
        """
        if self.truncation == "drop":
            return TOO_LONG
        if self.truncation == "keep_start":
            room = self.max_length - len(prompt)
            if room < 1:
                return NO_ROOM
            masks = [mask[:room] for mask in masks]
            return (prompt, [response[:room] for response in responses], masks) if all(map(any, masks)) else NO_ROOM
        begin = self.text_spans.begin
        kept = begin if tuple(prompt[: len(begin)]) == begin else ()
        room = self.max_length - max(map(len, responses), default=1) - len(kept)
        if room >= 1:
            return [*kept, *prompt[-room:]], responses, masks
        return self._without_first_turns(kept, responses, masks)

    def _without_first_turns(
        self, kept: tuple[int, ...], responses: list[list[int]], masks: list[list[bool]]
    ) -> tuple[list[int], list[list[int]], list[list[bool]]] | str:
        """Drop the first turns of a conversation that is too long: the text before the first turn that fits whole is its prompt.

        Args:
            kept: the beginning token's ids, which stay in front of the prompt.
        """
        if len(responses) != 1:
            return TOO_LONG
        response, mask = responses[0], masks[0]
        first = max(1, len(response) - (self.max_length - len(kept)))
        for start in range(first + 1, len(response)):
            if mask[start] and not mask[start - 1]:
                return [*kept, *response[first:start]], [response[start:]], [mask[start:]]
        return TOO_LONG


def _begins_with(spans: Sequence[TextSpan], ids: tuple[int, ...]) -> bool:
    """Return whether the first spans are these ids, one id per span."""
    return bool(ids) and [span.ids for span in spans[: len(ids)]] == [(token,) for token in ids]
