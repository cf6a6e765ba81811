"""A row of known shape → its prompt and responses: all as texts, or all as messages where any of them is a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.contracts.records import Message, Prompt, RecordType, Role
from rlhf_core.data.columns import TURNS, value_kind
from rlhf_core.data.messages import is_dialogue, read_dialogue, read_messages, read_text, read_tools, wrong_type
from rlhf_core.data.row_shapes import RowShape
from rlhf_core.infra.errors import DataError, shortened

FIRST = "the conversation begins with an assistant turn, which answers nothing and is context only"
LAST = "the conversation ends on turns that nothing answers, which are left out"


@dataclass(frozen=True, slots=True)
class PromptResponses:
    """The prompt and the responses of one row."""

    prompt: Prompt
    responses: tuple[str, ...] | tuple[list[Message], ...]
    tools: list[dict[str, Any]] | None
    prompt_inside: bool = False
    """Whether the prompt was taken from the beginning of the responses, and a column with its text was not used."""
    set_aside: tuple[str, ...] = ()
    """Warnings on turns that are kept out of the loss because no question precedes them, or no answer follows."""

    @property
    def texts(self) -> list[str]:
        """Every text in it, stripped of white space at both ends. The last texts of the responses are the last entries."""
        messages = [] if isinstance(self.prompt, str) else list(self.prompt)
        for response in self.responses:
            messages += [] if isinstance(response, str) else response[:-1]
        texts = [self.prompt] if isinstance(self.prompt, str) else []
        texts += [message["content"] for message in messages]
        texts += [item if isinstance(item, str) else item[-1]["content"] for item in self.responses]
        return [text.strip() for text in texts]


def in_loss(message: Message) -> bool:
    """Return whether a turn after the prompt is in the loss: it is the assistant's, and its weight isn't 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def read_prompt_responses(shape: RowShape, contract: RecordType, place: str) -> PromptResponses:
    """Return the prompt and the responses of a row.

    Args:
        shape: which columns of the row hold what, and their values.
        contract: the record type.
        place: where the row is, for messages.

    Raises:
        DataError: a column has a value of the wrong type, a response is empty, or there is no prompt before it.
    """
    row = _RowReader(shape, contract, place)
    if "text" in shape.columns:
        return PromptResponses("", (_filled(row.of("text"), "text", place),), None)
    tools = read_tools(row.of("tools"), row.name("tools"), place)
    if "messages" in shape.columns:
        prompt, responses = row.conversation()
    else:
        if tools is None and not row.is_chat():
            return PromptResponses(
                row.text_prompt(), tuple(_filled(row.answer(n), row.name(n), place) for n in contract.responses), None
            )
        prompt, responses = row.chat()
    prompt = row.with_system(prompt)
    _check_prompt(prompt, row, place)
    return PromptResponses(prompt, tuple(responses), tools, row.prompt_inside, tuple(row.set_aside))


class _RowReader:
    """Reads the fields of one row (`prompt`, `chosen`, `system` …), whatever columns hold them."""

    def __init__(self, shape: RowShape, contract: RecordType, place: str) -> None:
        self.shape, self.contract, self.place = shape, contract, place
        self.prompt_inside = False
        """Whether the prompt at the beginning of the responses was used, and a column with its text was not."""
        self.set_aside: list[str] = []

    def name(self, what: str) -> str:
        """Return the column that holds a field, for messages; the field's own name where none does."""
        return self.shape.columns.get(what, what)

    def of(self, what: str) -> Any:
        """Return the value of a field; None where the row doesn't have it."""
        return self.shape.values.get(self.name(what)) if what in self.shape.columns else None

    def answer(self, what: str) -> Any:
        """Return the value of a response field, without the prompt at its beginning where the responses repeat it."""
        value = self.of(what)
        return value[len(self.of("prompt")) :] if self.shape.prompt_repeated else value

    def is_chat(self) -> bool:
        """Return whether any field of the row is turns rather than text, so that the row is encoded with the chat template."""
        if {"system", "history"} & {*self.shape.columns}:
            return True
        parts = [self.of(name) for name in ("prompt", *self.contract.responses)]
        return self.shape.format == "dialogue" or any(isinstance(part, list | tuple | dict) for part in parts)

    def text_prompt(self) -> str:
        """Return the prompt as text: after an instruction its input, with an empty line between them."""
        prompt = self.of("prompt")
        if not isinstance(prompt, str):
            raise wrong_type(self.name("prompt"), "text or a list of messages", prompt, self.place)
        more = self.of("input")
        if more is None or (isinstance(more, str) and not more.strip()):
            return prompt
        if not isinstance(more, str):
            raise wrong_type(self.name("input"), "text", more, self.place)
        return f"{prompt}\n\n{more}" if prompt.strip() else more

    def conversation(self) -> tuple[list[Message], list[list[Message]]]:
        """Return a conversation's messages before the first turn in the loss, and as the only response those from it on.

        Of a labelled conversation (`unpaired`) the response is the last turn alone.
        """
        column = self.name("messages")
        turns = self._answered(self._turns("messages"))
        # Assistant turns at the beginning answer no question, so they are context.
        asked = next((number for number, turn in enumerate(turns) if turn["role"] != "assistant"), len(turns))
        if 0 < asked < len(turns):
            self.set_aside.append(FIRST)
        in_the_loss = [number for number, turn in enumerate(turns) if in_loss(turn) and number >= asked % len(turns)]
        if not in_the_loss:
            raise DataError("every assistant turn has weight 0, so none is in the loss", place=self.place)
        for number in in_the_loss:
            _check_answer(turns[number], f"{column}[{number}]", self.place)
        first = len(turns) - 1 if "label" in self.contract.required else in_the_loss[0]
        return turns[:first], [turns[first:]]

    def _answered(self, turns: list[Message]) -> list[Message]:
        """Return a conversation's turns up to the last one of the assistant.

        Raises:
            DataError: no turn is the assistant's.
        """
        last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
        if last is None:
            raise DataError(
                f"the conversation ends on a {turns[-1]['role']} turn, which nothing answers",
                place=self.place,
                fix="end it on an assistant turn",
            )
        if last + 1 < len(turns):
            self.set_aside.append(LAST)
        return turns[: last + 1]

    def chat(self) -> tuple[list[Message], list[list[Message]]]:
        """Return the messages of the prompt, and the messages of each response that follow them."""
        answers = [self._answer(name) for name in self.contract.responses]
        raw = self.of("prompt")
        asked: list[Message] = []
        if isinstance(raw, list | tuple):
            asked = read_messages(raw, self.name("prompt"), self.place)
        elif raw is not None:
            asked = [*self._history(), {"role": "user", "content": self.text_prompt()}]
        shared = self._shared(answers) if self.shape.prompt_inside else 0
        if shared:
            before = answers[0][:shared]
            answers = [answer[shared:] for answer in answers]
            if not any(turn["role"] == "user" for turn in before):
                asked = [*before, *asked]
            else:
                repeated = [_says_the_same(*both) for both in zip(asked, before[-len(asked) :], strict=False)]
                if isinstance(raw, list | tuple) and not (len(asked) <= len(before) and all(repeated)):
                    raise DataError(
                        f"the responses contain another prompt than `{self.name('prompt')}`",
                        place=self.place,
                        got=f"{_shown(before[-1])}, `{self.name('prompt')}` ends {_shown(asked[-1])}",
                        fix="keep one of them",
                    )
                asked, self.prompt_inside = before, isinstance(raw, str)
        elif len(answers) == 1:
            shared = _repeated(asked, answers[0])
            asked, answers = answers[0][:shared] or asked, [answers[0][shared:]]
        for name, answer in zip(self.contract.responses, answers, strict=True):
            _check_response(answer, self.name(name), shared, self.place)
        return asked, answers

    def with_system(self, prompt: list[Message]) -> list[Message]:
        """Return the prompt with the text of the system column before it, where that has any."""
        given = self.of("system")
        system = "" if given is None else read_text(given, self.name("system"), self.place)
        if not system.strip():
            return prompt
        if prompt and prompt[0]["role"] == "system":
            if prompt[0]["content"].strip() == system.strip():
                return prompt
            raise DataError(
                f"has both a system turn and a column `{self.name('system')}`, which differ",
                place=self.place,
                got=f"{_shown(prompt[0])} and {shortened(system)}",
                fix="keep one of them",
            )
        return [{"role": "system", "content": system}, *prompt]

    def _turns(self, what: str) -> list[Message]:
        """Return the messages of a field that holds turns of any kind, a dialogue, or texts of both speakers in alternation."""
        value = self.of(what)
        if isinstance(value, str) and is_dialogue(value):
            return read_dialogue(value)
        if value_kind(value) == "texts":
            roles: tuple[Role, ...] = ("user", "assistant")
            return [{"role": roles[number % 2], "content": text} for number, text in enumerate(value)]
        return read_messages(value, self.name(what), self.place)

    def _answer(self, name: str) -> list[Message]:
        """Return a response as messages; a text is one assistant turn."""
        value = self.answer(name)
        if self.shape.prompt_repeated:
            value = value.lstrip()
        if isinstance(value, str) and not (self.shape.format == "dialogue" and is_dialogue(value)):
            return [{"role": "assistant", "content": _filled(value, self.name(name), self.place)}]
        if not isinstance(value, str) and value_kind(value) not in (*TURNS, "turn", "empty"):
            raise wrong_type(self.name(name), "text or a list of messages", value, self.place)
        return self._turns(name)

    def _history(self) -> list[Message]:
        """Return the messages of earlier turns, from the column for them."""
        history = self.of("history")
        if value_kind(history) in (*TURNS, "texts"):
            return self._turns("history")
        turns: list[Message] = []
        for question, answer in history or []:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return turns

    def _shared(self, answers: Sequence[list[Message]]) -> int:
        """Return with how many equal messages the responses begin: those are the prompt.

        Raises:
            DataError: the first messages that differ aren't the assistant's.
        """
        shared = 0
        while shared < min(map(len, answers)) and all(
            _says_the_same(answer[shared], answers[0][shared]) for answer in answers
        ):
            shared += 1
        if shared == min(map(len, answers)):
            # One is the beginning of the other, or both are equal: the response begins at the last answer that they share.
            shared = max((n for n in range(shared) if answers[0][n]["role"] == "assistant"), default=shared)
        if any(answer[shared]["role"] != "assistant" for answer in answers if shared < len(answer)):
            got = ", ".join(
                f"`{self.name(name)}[{shared}]` is {_shown(answer[shared])}"
                for name, answer in zip(self.contract.responses, answers, strict=True)
            )
            raise DataError(
                f"the responses differ in message {shared}, which isn't the assistant's",
                place=self.place,
                got=got,
                fix="give both responses the same prompt, or delete the row",
            )
        return shared


def _repeated(asked: Sequence[Message], answer: Sequence[Message]) -> int:
    """Return how many messages at the beginning of a response repeat the prompt, with a system turn before it; else 0."""
    for skipped in (0, 1):
        end = skipped + len(asked)
        if not asked or len(answer) <= end or (skipped and answer[0]["role"] != "system"):
            return 0
        if all(_says_the_same(*both) for both in zip(asked, answer[skipped:end], strict=True)):
            return end
    return 0


def _says_the_same(one: Message, other: Message) -> bool:
    """Return whether two turns have the same role, content and tool calls; other keys, such as a time, may differ."""
    return all(one.get(key) == other.get(key) for key in ("role", "content", "tool_calls"))


def _check_prompt(prompt: Sequence[Message], row: _RowReader, place: str) -> None:
    """Raise `DataError` where there is no prompt, or it ends on an assistant turn."""
    if not prompt and "messages" in row.shape.columns:
        raise DataError("the conversation begins with an assistant turn, which answers nothing", place=place)
    if not prompt:
        raise DataError("the responses begin with an assistant turn, and there is no prompt before it", place=place)
    # What precedes the first turn in the loss of a conversation may end on an assistant turn of weight 0.
    if prompt[-1]["role"] == "assistant" and "messages" not in row.shape.columns:
        raise DataError(
            "the prompt ends on an assistant turn, which leaves nothing to answer",
            place=place,
            fix="end it on a user turn, and put the answer into its own column",
        )


def _check_response(answer: Sequence[Message], name: str, shared: int, place: str) -> None:
    """Raise `DataError` unless a response begins and ends with an assistant turn, and has one in the loss that isn't empty.

    Args:
        name: the response's column.
        shared: how many messages of that column are the prompt, to number the others in messages.
    """
    where = [f"{name}[{number}]" for number in range(shared, shared + len(answer))]
    if not answer:
        raise DataError(f"`{name}` has no answer after the prompt", place=place)
    for number in (0, -1):
        if answer[number]["role"] != "assistant":
            raise DataError(
                f"`{name}` must {'begin' if number == 0 else 'end'} with an assistant turn",
                place=place,
                got=f"`{where[number]}` is {_shown(answer[number])}",
            )
    for turn, at in zip(answer, where, strict=True):
        if in_loss(turn):
            _check_answer(turn, at, place)
    if not any(map(in_loss, answer)):
        raise DataError(f"every assistant turn of `{name}` has weight 0, so none is in the loss", place=place)


def _check_answer(turn: Message, name: str, place: str) -> None:
    """Raise `DataError` where an assistant turn has neither content, nor tool calls, nor reasoning."""
    if turn["content"].strip() or any(
        turn.get(key) for key in ("tool_calls", "function_calls", "reasoning_content", "reasoning", "thinking")
    ):
        return
    raise DataError(f"`{name}` is an empty response", place=place, fix="fill or delete the row")


def _filled(value: Any, name: str, place: str) -> str:
    """Return a response as text, or raise `DataError` where it is no text or empty."""
    if not isinstance(value, str):
        raise wrong_type(name, "text", value, place)
    if not value.strip():
        raise DataError(f"`{name}` is an empty response", place=place, fix="fill or delete the row")
    return value


def _shown(message: Message) -> str:
    """Return a message with its role, shortened, for an error."""
    return f"{message['role']}: {shortened(message['content'])}"
