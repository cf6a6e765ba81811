"""Chat templates: messages → pieces of text, what is learnt told apart, control tokens only where the template puts them.

A template is rendered for each prefix of a conversation that an assistant turn follows. Each rendering must be the beginning
of the whole one, which gives every learnt turn its exact characters; nothing is searched for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import ConfigError, DataError, ModelError
from rlhf_core.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTION = "dataset.chat_template"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, or some ids, to be encoded on its own."""

    text: str = ""
    ids: tuple[int, ...] = ()
    """Ids that stand as they are, instead of text."""
    learnt: bool = False
    literal: bool = True
    """Whether the text of a control token is only text. False where a template wrote it."""
    continues: bool = False
    """Whether text stands before it, so that a tokenizer which marks a text's beginning must not mark this one's."""


class ControlTokens:
    """The tokenizer's special tokens, as they would look in text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokens = {
            token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        names = sorted((name for name in self.tokens if name), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        # Some tokenizers mark a text's beginning behind a control token too.
        after, alone = (
            (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{names[0]}a", "a"))
            if names
            else ([], [])
        )
        self._begins_text = after[1:] == alone

    def within(self, text: str) -> bool:
        """Tell whether the text holds what looks like a control token."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def end_of_last(self, text: str) -> int | None:
        """Return where the last control token in the text ends, or None where there is none."""
        ends = [match.end() for match in self._pattern.finditer(text)] if self._pattern else []
        return ends[-1] if ends else None

    def continued(self, before: str) -> bool:
        """Tell whether the tokenizer takes what follows this text as its continuation, not as a text's beginning."""
        return not (self._begins_text and self.end_of_last(before) == len(before))

    def hidden(self, text: str, mark: str) -> str:
        """Return the text with each control token replaced by a plain word that `mark` makes unmistakable."""
        if self._pattern is None:
            return text
        numbers = {name: number for number, name in enumerate(self.tokens)}
        return self._pattern.sub(lambda match: f"{mark}{numbers[match.group()]}z", text)

    def shown(self, text: str, mark: str) -> str:
        """Undo `hidden`."""
        names = list(self.tokens)
        return re.sub(rf"{mark}(\d+)z", lambda match: names[int(match.group(1))], text)

    def pieces(self, text: str, mark: str, *, learnt: bool, continues: bool) -> list[Piece]:
        """Cut rendered text at its true control tokens; what was hidden is text again in the pieces between."""
        pieces: list[Piece] = []
        parts = re.split(f"({self._pattern.pattern})", text) if self._pattern else [text]
        for number, part in enumerate(parts):
            if number % 2:
                pieces.append(Piece(ids=(self.tokens[part][0],), learnt=learnt))
                continue
            # As the tokenizer does: some control tokens swallow the white space beside them.
            if number and self.tokens[parts[number - 1]][1].rstrip:
                part = part.lstrip()
            if number + 1 < len(parts) and self.tokens[parts[number + 1]][1].lstrip:
                part = part.rstrip()
            if part:
                pieces.append(
                    Piece(
                        self.shown(part, mark), learnt=learnt, continues=not self._begins_text if number else continues
                    )
                )
        return pieces


class ChatTemplate:
    """The tokenizer's chat template, or the one that the option gives in its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, option: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.control = ControlTokens(tokenizer)
        self.source = read_template(option) if option is not None else _own_template(tokenizer)

    @property
    def sha256(self) -> str | None:
        """Hash of the template's text; None where there is no template."""
        return hashlib.sha256(self.source.encode()).hexdigest() if self.source is not None else None

    def prompt(self, messages: Sequence[Message], place: str) -> list[Piece]:
        """Return the pieces of a prompt, up to where the assistant begins to speak."""
        mark, hidden = self._hide(messages)
        return self._pieces(self._render(hidden, place, answer=True), mark)

    def turns(
        self, messages: Sequence[Message], learnt: Sequence[int], place: str, *, also: Sequence[str] = ()
    ) -> tuple[list[Piece], list[Piece]]:
        """Return the pieces before the first learnt turn, and those from it to the end of the last.

        Args:
            messages: the conversation, which ends on the last learnt turn.
            learnt: which messages are learnt, each with the control token that ends its turn.
            also: other texts of the row (the other answer), so that one prompt is cut alike for both.

        Raises:
            ModelError: there is no template, or it doesn't render a conversation's beginning as it renders the whole.
            DataError: the template refuses this conversation.
        """
        mark, hidden = self._hide(messages, also)
        whole = self._render(hidden, place)
        response: list[Piece] = []
        prompt_end = end = 0
        for turn in learnt:
            before = self._render(hidden[:turn], place, answer=True)
            after = self._render(hidden[: turn + 1], place) if turn + 1 < len(hidden) else whole
            start, stop = len(before), len(after)
            if not (whole.startswith(after) and after.startswith(before)) or start < end:
                raise self._rewrites(place, turn)
            self._check_opening(hidden, turn, before, whole[start:stop], place)
            if turn == learnt[0]:
                prompt_end = start
            else:
                response += self._pieces(whole[end:start], mark, continues=self.control.continued(whole[:end]))
            end, closed = start + (self.control.end_of_last(whole[start:stop]) or 0), True
            if end == start:
                end, closed = stop, False
            response += self._pieces(whole[start:end], mark, learnt=True, continues=self.control.continued(before))
            if not closed and turn == learnt[-1] and self.tokenizer.eos_token_id is not None:
                response.append(Piece(ids=(self.tokenizer.eos_token_id,), learnt=True))
        return self._pieces(whole[:prompt_end], mark), response

    def _hide(self, messages: Sequence[Message], also: Sequence[str] = ()) -> tuple[str | None, list[Message]]:
        """Put plain words in place of control tokens in contents; the mark of those words, or None where there are none."""
        contents = [message["content"] for message in messages] + list(also)
        if not any(map(self.control.within, contents)):
            return None, list(messages)
        mark = "zqControl"
        while any(mark in content for content in contents):
            mark += "q"
        return mark, [
            {"role": message["role"], "content": self.control.hidden(message["content"], mark)} for message in messages
        ]

    def _pieces(self, text: str, mark: str | None, *, learnt: bool = False, continues: bool = False) -> list[Piece]:
        if mark is not None and mark in text:
            return self.control.pieces(text, mark, learnt=learnt, continues=continues)
        return [Piece(text, learnt=learnt, literal=False, continues=continues)] if text else []

    def _check_opening(self, messages: Sequence[Message], turn: int, before: str, span: str, place: str) -> None:
        # A template that ignores the generation prompt leaves the turn's opening where the answer should begin.
        opens = span.lstrip().startswith(messages[turn]["content"].strip())
        if not opens and before == self._render(messages[:turn], place):
            raise ModelError(
                "the chat template ignores `add_generation_prompt`, so where an answer begins can't be told",
                place=place,
                fix=f"give a template that honours it by `{OPTION}`",
            )

    def _rewrites(self, place: str, turn: int) -> ModelError:
        return ModelError(
            f"the chat template renders the conversation up to message {turn} otherwise once it goes on, so the answer's"
            " tokens can't be told apart",
            place=place,
            fix=f"give a template that only appends by `{OPTION}`, or make each turn a row of its own",
        )

    def _render(self, messages: Sequence[Message], place: str, *, answer: bool = False) -> str:
        import jinja2

        if self.source is None:
            raise ModelError(
                "the data hold chat messages, and the tokenizer has no chat template",
                place=place,
                fix=f"give one by `{OPTION}`, or use a model that has one",
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.source, add_generation_prompt=answer, tokenize=False
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError("the chat template is not valid Jinja", place=OPTION, got=str(error)) from None
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise DataError("the chat template refuses the messages", place=place, got=str(error)) from None


def read_template(option: str) -> str:
    """Return the template that an option gives: its text, or the text of the file that it names."""
    if "{{" in option or "{%" in option:
        return option
    path = Path(option).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "neither a Jinja template nor a readable file", place=OPTION, got=f"{option!r} ({error})"
        ) from None


def _own_template(tokenizer: Any) -> str | None:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        return own.get("default")
    return own
