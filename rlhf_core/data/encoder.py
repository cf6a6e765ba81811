"""Rows → token ids: one encoder for map-style and streaming data, for text and chat.

A prompt's ids never depend on its response: the two are encoded apart, exactly as a sampler would meet them. The mask says
which response tokens are in the loss, the one that ends a turn included. No id is ever compared with a padding id.
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

Truncation = Literal["keep_start", "keep_end", "drop"]
Wrap = Literal["none", "chat"]

NO_ROOM = "the prompt leaves no response token"
TOO_LONG = "longer than max_length"
EQUAL = "chosen equals rejected"

PLAIN = (
    "the rows are plain text, and the model has a chat template, which they don't pass: `dataset.wrap: chat` makes a prompt the"
    " user's turn and a response the assistant's, `none` keeps them as they are"
)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as token ids."""

    index: int
    prompt_ids: list[int]
    """At least one id."""
    responses: list[list[int]] = field(default_factory=list)
    masks: list[list[bool]] = field(default_factory=list)
    """For each response token, whether it is in the loss; at least one in each response is."""
    per_prompt: dict[str, float] = field(default_factory=dict)
    per_response: dict[str, list[bool]] = field(default_factory=dict)
    prompt: Prompt = ""
    """The prompt as it stands in the data: text, or chat messages."""
    record: dict[str, Any] = field(default_factory=dict)
    """Its other columns that are kept."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of its responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of one row: encoded, or refused with a reason."""

    place: str
    row: EncodedRow | None
    refused: str | None = None
    truncated: bool = False
    control_text: tuple[str, ...] = ()
    """What in its text looks like control tokens. It was encoded as text."""
    left_out: tuple[str, ...] = ()
    read_as: str | None = None
    """What was taken for what; see `checks.Example`."""
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What else a person should know of the row."""
    lost: tuple[str, ...] = ()
    """What the data hold and the chat template doesn't render."""
    set_aside: tuple[str, ...] = ()
    """Turns that are not in the loss because nothing asks for them or answers them."""
    absent: tuple[tuple[str, str], ...] = ()
    """Columns that `dataset.columns` names and the row lacks; see `checks.Example`."""


@dataclass(slots=True)
class _RowSpans:
    example: CheckedRow
    prompt: list[TextSpan]
    responses: list[list[TextSpan]]
    control_text: list[str]
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class Encoder:
    """Turns rows of one record type into token ids.

    Text prompts are encoded as they are, after the tokenizer's own beginning token where it adds one; text responses continue
    them and get the end token. Chat messages are rendered by the chat template, which alone says where control tokens stand.

    Args:
        chat_template: in place of the tokenizer's own: its text, or the path of a file.
        wrap: `chat` makes a text prompt the user's turn; None takes what is kept with the tokenizer, else `none`.
        special_tokens: control tokens that data may use; None takes what is kept with the tokenizer, else none.
        turns: `each` makes every assistant turn a row of its own.
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
                f"`{record}` rows have no turns to train apart", place="dataset.turns", got=turns, fix="leave it out"
            )
        self.tokenizer, self.record, self.turns = tokenizer, record, turns
        self.max_length, self.truncation = max_length, truncation
        self.checker = RowChecker(record, columns, format=format, ignored=ignored)
        kept = TextOptions.of(tokenizer)
        self.wrap = kept.wrap if wrap is None else wrap
        allowed = kept.special_tokens if special_tokens is None else special_tokens
        self.template = ChatTemplate(tokenizer, chat_template, allowed=allowed or ())
        self.text_spans = TextSpanEncoder(tokenizer)
        self.chats = False
        """Whether a row so far was a chat."""
        self.wrapped = False
        """Whether a text prompt so far was made the user's turn."""
        self.plain = False
        """Whether a row was plain text where a chat template would have something to say, and nobody has said which is meant."""

    def state_dict(self) -> dict[str, bool]:
        """Return what the rows so far were, as JSON values."""
        return {"chats": self.chats, "wrapped": self.wrapped, "plain": self.plain}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Take over what `state_dict` returned: the same rows were encoded before."""
        self.chats, self.wrapped, self.plain = state["chats"], state["wrapped"], state["plain"]

    def identity(self) -> dict[str, Any] | None:
        """Return as JSON values what decides which ids a row gets, but for the row, the options and the code.

        None where that can't be told: the tokenizer's class isn't transformers' own or it has parts that can't be written, or
        the chat template asks for a time that changes from one run to the next.
        """
        tokenizer, times = self.tokenizer, self.template.times()
        if times is None or not type(tokenizer).__module__.startswith("transformers."):
            return None
        try:
            written = tokenizer.backend_tokenizer.to_str()
        except Exception:  # Parts of it are written in Python.
            return None
        return {
            "record": self.record,
            "max_length": self.max_length,
            "wrap": self.wrap,
            "tokenizer": hashlib.sha256(written.encode()).hexdigest(),
            "tokenizer_class": type(tokenizer).__qualname__,
            "control_tokens": {name: number for name, (number, _) in self.template.control.tokens.items()},
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "begin": list(self.text_spans.begin),
            "templates": [self.template.source, self.template.with_tools],
            "times": times,
        }

    def encode(self, rows: Sequence[Row]) -> list[RowOutcome]:
        """Return what becomes of each row, in order. The tokenizer is called a few times for all of them.

        Raises:
            DataError: a row breaks its record type.
            ModelError: the tokenizer lacks what the rows need (a chat template, an end token).
        """
        return [outcome for group in self.encode_each(rows) for outcome in group]

    def encode_each(self, rows: Sequence[Row]) -> list[list[RowOutcome]]:
        """Return for each row what becomes of it: one outcome, or one for each assistant turn where `turns` is `each`."""
        plans = [[self._plan(example) for example in self._examples(row)] for row in rows]
        flat = [plan for group in plans for plan in group]
        text_spans = [text_span for plan in flat for group in (plan.prompt, *plan.responses) for text_span in group]
        ids = iter(self.text_spans(text_spans))
        return [[self._encoded(plan, ids) for plan in group] for group in plans]

    def _encoded(self, plan: _RowSpans, ids: Iterator[Sequence[int]]) -> RowOutcome:
        prompt = [token for _ in plan.prompt for token in next(ids)]
        responses, masks = [], []
        for group in plan.responses:
            parts = [(next(ids), text_span.in_loss) for text_span in group]
            responses.append([token for part, _ in parts for token in part])
            masks.append([in_loss for part, in_loss in parts for _ in part])
        return self._outcome(plan, prompt, responses, masks)

    def _examples(self, row: Row) -> list[CheckedRow]:
        example = self._wrapped(self.checker.check(row))
        if isinstance(example.prompt, str) or self.turns == "together" or not example.responses:
            return [example]
        messages = [*example.prompt, *example.responses[0]]
        each = [
            replace(
                example, prompt=messages[:number], responses=([message],), asked=self._asked(example, messages[:number])
            )
            for number, message in enumerate(messages)
            if number >= len(example.prompt) and in_loss(message)
        ]
        return each or [example]

    def _asked(self, example: CheckedRow, prompt: list[Message]) -> Prompt:
        """Return what a turn of a conversation answers, as it stands in the data."""
        return example.asked if len(prompt) == len(example.prompt) else as_json(prompt)

    def _wrapped(self, example: CheckedRow) -> CheckedRow:
        """Make a text prompt the user's turn, and its responses the assistant's, where that is asked for."""
        if not isinstance(example.prompt, str) or not example.prompt:
            return example
        if self.wrap is None and self.template.source is not None:
            self.plain = True
        if self.wrap != "chat":
            return example
        self.wrapped = True
        answers = [[Message(role="assistant", content=text)] for text in example.responses if isinstance(text, str)]
        return replace(example, prompt=[Message(role="user", content=example.prompt)], responses=tuple(answers))

    def _plan(self, example: CheckedRow) -> _RowSpans:
        if isinstance(example.prompt, str):
            return self._text_plan(example, example.prompt)
        self.chats = True
        prompt, tools, place = example.prompt, example.tools, example.place
        contents = [prompt, tools or [], *example.responses]
        seen = [name for text in texts_in(contents) for name in self.template.control.within(text)]
        if not example.responses:
            chat = self.template.chat(prompt, place, tools=tools)
            text = self.template.render(chat, answer=True)
            lost = [UNUSED_TOOLS] if ignores_tools(self.template, chat, text, answer=True) else []
            return _RowSpans(example, self.template.control.rendered_spans(text, chat.mark), [], seen, lost=lost)
        both = []
        for messages in example.responses:
            assert not isinstance(messages, str)
            numbers = [number for number, turn in enumerate(messages, len(prompt)) if in_loss(turn)]
            if not numbers:
                raise DataError("no turn of the answer is in the loss", place=place, fix="give one a `weight` of 1")
            # What stands behind the last turn in the loss would teach nothing, and may change how templates render it.
            chat = self.template.chat([*prompt, *messages][: numbers[-1] + 1], place, tools=tools, also=contents)
            both.append(split_turns(self.template, chat, numbers, answers_from=len(prompt)))
        if any(turns.prompt != both[0].prompt for turns in both):
            raise DataError(
                "the chat template renders the prompt otherwise for one answer than for the other", place=place,
                fix="give answers of one turn each",
            )  # fmt: skip
        notes, lost = ([text for turns in both for text in getattr(turns, name)] for name in ("notes", "lost"))
        return _RowSpans(example, both[0].prompt, [turns.response for turns in both], seen, notes, lost)

    def _text_plan(self, example: CheckedRow, prompt: str) -> _RowSpans:
        control = self.template.control
        texts = [text for text in example.responses if isinstance(text, str)]
        seen = [name for text in (prompt, *texts) for name in control.within(text)]
        # A response continues its prompt: what marks a text's beginning (Llama's `▁`) stands at the prompt's alone.
        answers = [control.spans_in_text(text, in_loss=True, continues=bool(prompt)) for text in texts]
        if not prompt:
            # A whole text that writes its own beginning token has it as its prompt.
            begin = self.text_spans.begin or (self._stand_in(example),)
            answers = [answer[len(begin) :] if _begins_with(answer, begin) else answer for answer in answers]
        answers = [self._ended(answer, example) for answer in answers]
        before = control.spans_in_text(prompt)
        if not _begins_with(before, self.text_spans.begin):
            before.insert(0, TextSpan(ids=self.text_spans.begin))
        lost = ["`tools` reach a chat template, and the rows are plain text"] if example.tools else []
        return _RowSpans(example, before, answers, seen, lost=lost)

    def _ended(self, answer: list[TextSpan], example: CheckedRow) -> list[TextSpan]:
        """Return a response with the end token behind it, which its text may have written itself."""
        end = self._end_span(example)
        for length in (len(answer), len(answer) - 1):
            if length > 0 and answer[length - 1].ids == end.ids and not any(p.text.strip() for p in answer[length:]):
                return answer[:length]
        return [*answer, end]

    def _end_span(self, example: CheckedRow) -> TextSpan:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end token, so a response could not be ended",
                place=example.place,
                fix="set the tokenizer's `eos_token`",
            )
        return TextSpan(ids=(self.tokenizer.eos_token_id,), in_loss=True)

    def _outcome(
        self, plan: _RowSpans, prompt: list[int], responses: list[list[int]], masks: list[list[bool]]
    ) -> RowOutcome:
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
                dict(example.per_prompt), dict(example.per_response), example.asked, dict(example.record),
            )  # fmt: skip
        control, notes, lost = (tuple(dict.fromkeys(found)) for found in (plan.control_text, plan.notes, plan.lost))
        return RowOutcome(
            example.place, row, reason, truncated and row is not None, control,
            example.left_out, example.read_as, example.unused, notes, lost, example.set_aside, example.absent,
        )  # fmt: skip

    def _stand_in(self, example: CheckedRow) -> int:
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
        """Cut to `max_length` by the policy; the reason instead where nothing of the loss would be left."""
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


def _begins_with(text_spans: Sequence[TextSpan], ids: tuple[int, ...]) -> bool:
    """Tell whether text_spans begin with text_spans of these ids, one each."""
    return bool(ids) and [text_span.ids for text_span in text_spans[: len(ids)]] == [(token,) for token in ids]
