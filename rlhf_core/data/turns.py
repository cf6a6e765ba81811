"""Finds the assistant's turns in a rendered conversation, and says which of its text is in the loss.

The whole conversation is rendered once, and a turn is trained as it is in that text, with the control token that ends it. Most
templates only append, so rendering the first n messages gives the exact offset at which each turn begins and ends. Some rewrite
earlier turns (drop reasoning, write an end token after the last turn only, move the system message). There a turn is found by
rendering again with a made-up word in place of its content, or of the message before it. Contents are never searched for: they
may repeat, and templates may trim them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from rlhf_core.data.chat_rendering import OPTION, Chat, ChatTemplate, common_prefix
from rlhf_core.data.text_spans import TextSpan
from rlhf_core.data.think_blocks import CLOSES, OPENS, closing_tag, reasoning_of
from rlhf_core.infra.errors import DataError, ModelError

EACH = "dataset.turns: each"

OTHER_CONTEXT = (
    f"the text before a turn isn't the prompt that generation would have: `{EACH}` trains each after its own prompt"
)
NO_STOP = f"the chat template writes no end token after an earlier turn, so it is trained without one: `{EACH}` ends each turn"
NO_PROMPT = (
    "the chat template ignores `add_generation_prompt`: an answer is trained after an opening that generation lacks"
)
TAGGED_STOP = "the chat template's generation tags leave out the end token of a turn, so it isn't in the loss"
UNUSED_TOOLS = "the chat template doesn't render the row's `tools`"
UNUSED_ROLE = "the chat template doesn't render role `{}`"
UNUSED = "the chat template doesn't render `{}`"


@dataclass(slots=True)
class SplitConversation:
    """A conversation split into prompt and response, as spans to be encoded."""

    prompt: list[TextSpan] = field(default_factory=list)
    response: list[TextSpan] = field(default_factory=list)
    """From the first assistant turn to the end of the last, the user's turns between them included."""
    notes: list[str] = field(default_factory=list)
    """Warnings for the user."""
    lost: list[str] = field(default_factory=list)
    """Warnings on what is in the data and not in the rendered text; errors under `dataset.strict`."""


@dataclass(slots=True)
class _Turn:
    """One assistant turn, with its place in the whole rendered text."""

    number: int
    """Number of its message."""
    start: int
    """Offset at which the text that the model writes begins."""
    end: int = 0
    """Offset at which it ends, after the control token that ends the turn."""
    opener: str = ""
    """Text of the generation prompt that the whole text lacks: the tag that opens a think block."""
    in_place: bool = True
    """Whether the whole text begins with the prompt that generation would have for this turn."""
    closed: bool = True
    """Whether the template writes a control token that ends the turn."""


def split_turns(
    template: ChatTemplate, chat: Chat, scored: Sequence[int], *, answers_from: int | None = None
) -> SplitConversation:
    """Split a conversation into the prompt and the response, which begins with the first assistant turn.

    The prompt of the last turn, and where possible of the first, is exactly what the template renders with its generation prompt.
    Where that opens a think block that the whole text lacks, the reasoning from the data follows it, in the loss; without
    reasoning the block is closed at once, outside of the loss.

    Args:
        scored: numbers of the messages that are in the loss, all of them the assistant's.
        answers_from: number of the first message after the prompt; where None, the first of `scored`.

    Raises:
        ModelError: a turn can't be found in the text, or the template drops its reasoning.
        DataError: the template refuses this conversation, or renders nothing of the turns in the loss.
    """
    return _TurnSplitter(template, chat).split(scored, scored[0] if answers_from is None else answers_from)


class _TurnSplitter:
    """Splits one conversation; see `split_turns`."""

    def __init__(self, template: ChatTemplate, chat: Chat) -> None:
        self.template, self.chat, self.control = template, chat, template.control
        self.whole = template.render(chat)
        self.turns = SplitConversation()
        self.tagged = template.tagged(chat)
        self._prompts: dict[int, str] = {}

    def split(self, scored: Sequence[int], first: int) -> SplitConversation:
        """Return the conversation split; `first` is the number of the first message after the prompt."""
        found = [
            self._find(number)
            for number, message in enumerate(self.chat.messages)
            if message["role"] == "assistant" and number >= first
        ]
        spans = self.template.generation_spans(self.chat)
        if spans is not None:
            self._tag(found, spans, scored)
        scored = [turn.number for turn in found if turn.number in scored and self._check(turn)]
        if not scored:
            raise DataError(
                "the chat template renders nothing of the answer, which is tool calls",
                place=self.chat.place,
                fix=f"give a template that renders them by `{OPTION}`",
            )
        at, alone = found[0].start, len(found) == 1
        before = self._before(found[0].number)
        if not alone or self.whole.startswith(before):
            before = self.whole[:at]
        self.turns.prompt = self._text_spans(before)
        for turn in found:
            if turn is not found[0]:
                self._add(self.whole[at : turn.start], before=self.whole[:at])
            counts = turn.number in scored
            if turn.opener and self._is_last(turn):
                self._add_after_opener(turn, added=not alone)
            if spans is None:
                self._add(self.whole[turn.start : turn.end], before=self.whole[: turn.start], in_loss=counts)
            else:
                self._add_tagged(turn, spans if counts else [])
            if not turn.closed and counts:
                self._add_stop(turn)
            at = turn.end
        self._note_unrendered()
        if ignores_tools(self.template, self.chat, self.whole):
            self.turns.lost.append(UNUSED_TOOLS)
        return self.turns

    # Offsets of the turns

    def _find(self, number: int) -> _Turn:
        """Return the turn of message `number` with its offsets."""
        before = self._before(number)
        turn = _Turn(number, len(before)) if self.whole.startswith(before) else self._find_start(number)
        if number == len(self.chat.messages) - 1:
            self._close(turn, len(self.whole), "", "")
        else:
            alone = self.template.render(self.chat.until(number + 1))
            if self.whole.startswith(alone) and len(alone) >= turn.start:
                self._close(turn, len(alone), self.whole[len(alone) :], "")
            else:
                self._find_end(turn)
        self._check_opening(turn)
        return turn

    def _before(self, number: int) -> str:
        """Return the prompt that generation would have for the turn of message `number`."""
        if number not in self._prompts:
            self._prompts[number] = self.template.render(self.chat.until(number), answer=True)
        return self._prompts[number]

    @cached_property
    def _words(self) -> tuple[str, str]:
        """Two words that don't occur in the conversation, to be put in place of contents."""
        return self.chat.word("A"), self.chat.word("B")

    def _is_last(self, turn: _Turn) -> bool:
        """Return whether no message follows a turn."""
        return turn.number == len(self.chat.messages) - 1

    def _find_start(self, number: int) -> _Turn:
        """Find a turn's beginning by the text that the template writes between the message before it and its content."""
        one, other = self._words
        if number > 0:
            marked = self.chat.with_text(number - 1, one)
            prompted = self.template.render(marked.until(number), answer=True)
            both = self.template.render(marked.with_text(number, other))
            whole = self.template.render(marked)
            behind = prompted.rpartition(one)[2]
            spoken, content, _ = both.rpartition(one)[2].partition(other)
            rest = whole.rpartition(one)[2]
            if one in prompted and one in both and one in whole and content and self.whole.endswith(rest):
                shared = common_prefix(behind, spoken)
                start = len(self.whole) - len(rest) + shared
                if shared == len(behind):
                    return _Turn(number, start, in_place=False)
                if shared == len(spoken):
                    return _Turn(number, start, opener=behind[shared:], in_place=False)
        raise self._not_found(number)

    def _find_end(self, turn: _Turn) -> None:
        """Find a turn's end by the text after its content, in the whole conversation and with the turn as the last one."""
        word, number = self._words[0], turn.number
        for keep_calls in (False, True):
            marked = self.chat.with_text(number, word)
            if keep_calls and "tool_calls" in (message := self.chat.messages[number]):
                marked.messages[number]["tool_calls"] = message["tool_calls"]
            try:
                whole, last = self.template.render(marked), self.template.render(marked.until(number + 1))
            except DataError:
                continue
            rest = whole.rpartition(word)[2]
            if word in whole and word in last and self.whole.endswith(rest):
                end = len(self.whole) - len(rest)
                alone = last.rpartition(word)[2]
                shared = self.control.whole_until(rest, self.control.whole_until(alone, common_prefix(rest, alone)))
                if end >= turn.start:
                    self._close(turn, end + shared, rest[shared:], alone[shared:])
                    return
        raise self._not_found(number)

    def _close(self, turn: _Turn, end: int, rest: str, alone_rest: str) -> None:
        """Set a turn's end: after the control token that ends it, which may be the one that begins the next turn.

        Args:
            end: offset at which the turn, rendered as the last one, ends or parts from the whole text.
            rest: the whole text from there; empty for the last turn.
            alone_rest: what the template writes there instead where the turn is the last.
        """
        closed = self.control.closed_end(self.whole[turn.start : end])
        if closed is not None:
            turn.end = turn.start + closed
            return
        turn.end = end
        run = self._control_run(rest)
        opening = self.template.opening
        opens = next((number for number, token in enumerate(run) if token.group() == opening), None)
        own = opens if opens is not None else len(run) - 1
        if own > 0:
            turn.end += run[own - 1].end()
        elif run and self._stops(run[0].group()) and not self.control.matches(alone_rest):
            turn.end += run[0].end()
        else:
            turn.closed = False

    def _stops(self, token: str) -> bool:
        """Return whether generation stops at this control token. One that begins another turn of the assistant is no stop."""
        return self.control.tokens[token][0] in self.template.stops

    def _control_run(self, text: str) -> list[re.Match[str]]:
        """Return the control tokens at the beginning of a text, with nothing but white space between them."""
        run: list[re.Match[str]] = []
        for token in self.control.matches(text):
            if text[run[-1].end() if run else 0 : token.start()].strip():
                break
            run.append(token)
        return run

    def _check_opening(self, turn: _Turn) -> None:
        """Raise `ModelError` where the template ignores `add_generation_prompt`, so the turn would begin with its header."""
        content = self.chat.messages[turn.number]["content"].strip()
        if self.tagged or self.whole[turn.start : turn.end].lstrip().startswith(content):
            return
        if self._before(turn.number) != self.template.render(self.chat.until(turn.number)):
            return
        word = self._words[0]
        spoken = self.template.render(self.chat.with_text(turn.number, word))
        header = spoken[common_prefix(spoken, self.whole[: turn.start]) :].partition(word)[0]
        if OPENS.sub("", CLOSES.sub("", header)).strip():
            raise ModelError(
                "the chat template ignores `add_generation_prompt`, so it isn't known where an answer begins",
                place=self.chat.place,
                fix=f"give a template that honours it by `{OPTION}`",
            )

    def _note_unrendered(self) -> None:
        """Warn of messages that the template leaves out, by their role."""
        for number, message in enumerate(self.chat.messages):
            if (
                message["role"] != "assistant"
                and not _holds(self.whole, message["content"])
                and self._leaves_out(number)
            ):
                self.turns.lost.append(UNUSED_ROLE.format(message["role"]))

    def _leaves_out(self, number: int) -> bool:
        """Return whether the template leaves out the content of a message."""
        word = self._words[0]
        try:
            return word not in self.template.render(self.chat.with_text(number, word))
        except DataError:
            return False

    def _not_found(self, number: int) -> ModelError:
        """Return the error for a turn that can't be found in the whole text, with the reason where one is known."""
        for message in (number - 1, number):
            if message >= 0 and self._leaves_out(message):
                role = self.chat.messages[message]["role"]
                follows = role == "assistant" and message > 0 and self.chat.messages[message - 1]["role"] == role
                what = UNUSED_ROLE.format(role) + (" where it follows itself" if follows else "")
                fix = f"give a template that does by `{OPTION}`"
                return ModelError(f"{what} (message {message})", place=self.chat.place, fix=fix)
        fix = f"give a template that only appends by `{OPTION}`"
        if number < len(self.chat.messages) - 1:
            fix = f"set `{EACH}`, which makes a row of each turn, or {fix}"
        return ModelError(
            f"the chat template changes the text up to message {number} once the conversation continues, so the tokens of that"
            " message can't be found",
            place=self.chat.place,
            fix=fix,
        )

    # Tokens in the loss

    def _tag(self, found: list[_Turn], spans: list[tuple[int, int]], scored: Sequence[int]) -> None:
        """Apply `{% generation %}` tags: warn where they leave out the end token, and begin a turn at its tag where the template
        ignores the generation prompt.

        Args:
            found: the turns, changed in place.
            spans: (begin, end) offsets that the tags enclose.
            scored: numbers of the messages in the loss.
        """
        for turn in found:
            own = [(begin, end) for begin, end in spans if begin < turn.end and end > turn.start]
            if not own:
                continue
            header = self.whole[turn.start : own[0][0]]
            if header.strip() and self._before(turn.number) == self.template.render(self.chat.until(turn.number)):
                turn.start = own[0][0]
                self.turns.notes.append(NO_PROMPT)
            left_out = self.whole[own[-1][1] : turn.end]
            if turn.number in scored and turn.closed and self.control.matches(left_out):
                self.turns.notes.append(TAGGED_STOP)

    def _check(self, turn: _Turn) -> bool:
        """Warn of reasoning and tool calls that the rendered text lacks; return whether anything of the turn is left to train on.

        Raises:
            ModelError: the template drops the turn's reasoning, or its whole content.
        """
        message, text = self.chat.messages[turn.number], self.whole[turn.start : turn.end]
        last = self._is_last(turn)
        key, reasoning = reasoning_of(message)
        if reasoning and not _holds(text, reasoning) and not (last and closing_tag(turn.opener)):
            alone = self.template.render(self.chat.until(turn.number + 1))
            if not last and (closing_tag(turn.opener) or _holds(alone, reasoning)):
                raise ModelError(
                    f"the chat template drops the reasoning of message {turn.number} once the conversation continues, so it"
                    " can't be trained there",
                    place=self.chat.place,
                    fix=f"set `{EACH}`, which makes a row of each turn, or give another template by `{OPTION}`",
                )
            if key == "content":
                raise ModelError(
                    f"the chat template drops the reasoning that message {turn.number} begins with",
                    place=self.chat.place,
                    fix=f"give a template that keeps it by `{OPTION}`, or leave the reasoning out of the data",
                )
            self.turns.lost.append(UNUSED.format(key))
        content = message["content"]
        if content.strip() and not _holds(text, content) and self._leaves_out(turn.number):
            raise ModelError(
                f"{UNUSED_ROLE.format('assistant')}, so nothing of message {turn.number} could be trained on",
                place=self.chat.place,
                fix=f"give a template that does by `{OPTION}`",
            )
        rendered = not message.get("tool_calls") or not self._ignores_calls(turn.number)
        if not rendered:
            self.turns.lost.append(UNUSED.format("tool_calls"))
        if not last and not turn.in_place:
            self.turns.notes.append(OTHER_CONTEXT)
        # Without its tool calls, a turn without content would train an empty answer.
        return rendered or bool(message["content"].strip())

    def _ignores_calls(self, number: int) -> bool:
        """Return whether the conversation is rendered the same without a message's tool calls."""
        messages = list(self.chat.messages)
        messages[number] = {key: value for key, value in messages[number].items() if key != "tool_calls"}
        try:
            return self.template.render(replace(self.chat, messages=messages)) == self.whole
        except DataError:
            return False

    def _add_after_opener(self, turn: _Turn, *, added: bool) -> None:
        """Add the text between a generation prompt that opens a think block and the turn's answer.

        It is the reasoning from the data with the closing tag, in the loss. Where the data have none it is the closing tag alone,
        outside of the loss: the model learns what to answer after its reasoning, and doesn't learn to skip it.

        Args:
            added: whether the opening tag isn't in the prompt and must be added, too.
        """
        text, opener = self.whole[turn.start : turn.end], turn.opener
        closing = closing_tag(opener)
        if closing is None:
            raise ModelError(
                "the chat template's generation prompt ends in text that a rendered turn lacks",
                place=self.chat.place,
                got=repr(opener),
                fix=f"give a template by `{OPTION}` that writes it in both, or in neither",
            )
        if added:
            self._add(opener, before=self.whole[: turn.start])
        opened = OPENS.match(text)
        if opened and opened.group().strip() == opener.strip():
            turn.start += opened.end()
        elif closing not in text:
            line = "\n" if opener.endswith("\n") else ""
            _, reasoning = reasoning_of(self.chat.messages[turn.number])
            # Where the answer was separated from its reasoning, it may still begin with the blank lines between the two.
            block = f"{reasoning.strip()}{line}{closing}{'' if text.startswith(line) else line * 2}"
            self._add(block, before=self._before(turn.number), in_loss=bool(reasoning))

    def _add_tagged(self, turn: _Turn, spans: list[tuple[int, int]]) -> None:
        """Add a turn's text, of which only what `spans` (offsets) enclose is in the loss."""
        at = turn.start
        for begin, end in spans:
            begin, end = max(begin, at), min(end, turn.end)
            if begin >= end:
                continue
            self._add(self.whole[at:begin], before=self.whole[:at])
            self._add(self.whole[begin:end], before=self.whole[:begin], in_loss=True)
            at = end
        self._add(self.whole[at : turn.end], before=self.whole[:at])

    def _add_stop(self, turn: _Turn) -> None:
        """Add the missing end of a last turn, in the loss: the control token that begins the next turn, else the end token."""
        if not self._is_last(turn):
            self.turns.notes.append(NO_STOP)
            return
        called = bool(self.chat.messages[turn.number].get("tool_calls"))
        marker = self.template.next_marker("tool") if called else None
        marker = marker or self.template.next_marker("user")
        end = self.template.tokenizer.eos_token_id
        if marker is not None:
            self._add(marker, before=self.whole[: turn.end], in_loss=True)
        elif end is not None:
            self.turns.response.append(TextSpan(ids=(end,), in_loss=True))

    def _add(self, text: str, *, before: str, in_loss: bool = False) -> None:
        """Add text to the response. `before` is all rendered text that precedes it."""
        self.turns.response += self._text_spans(text, in_loss=in_loss, continues=self.control.continued(before))

    def _text_spans(self, text: str, *, in_loss: bool = False, continues: bool = False) -> list[TextSpan]:
        return self.control.rendered_spans(text, self.chat.mark, in_loss=in_loss, continues=continues)


def ignores_tools(template: ChatTemplate, chat: Chat, rendered: str, *, answer: bool = False) -> bool:
    """Return whether a conversation has tools and is rendered the same without them."""
    if not chat.tools:
        return False
    return template.render(replace(chat, tools=None), answer=answer) == rendered


def _holds(text: str, part: str) -> bool:
    """Return whether a text contains another, white space ignored."""
    return "".join(part.split()) in "".join(text.split())
