"""A row whose columns are known → its prompt and responses: texts, or messages where any part of it is a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.contracts.records import Message, Prompt, RecordContract, Role
from rlhf_core.data.columns import TURNS, value_kind
from rlhf_core.data.messages import is_dialogue, read_dialogue, read_messages, read_text, read_tools, wrong_type
from rlhf_core.data.row_shapes import RowShape
from rlhf_core.infra.errors import DataError, shortened

FIRST = "the conversation begins with an assistant turn, which answers nothing and is context only"
LAST = "the conversation ends on turns that nothing answers, which are left out"


@dataclass(frozen=True, slots=True)
class PromptResponses:
    """What a row asks and what answers it."""

    prompt: Prompt
    responses: tuple[str, ...] | tuple[list[Message], ...]
    tools: list[dict[str, Any]] | None
    prompt_inside: bool = False
    """Whether the prompt is the one that the answers begin with, and not the text beside them."""
    set_aside: tuple[str, ...] = ()
    """Turns of a conversation that are not in the loss because nothing asks for them or answers them."""

    @property
    def texts(self) -> list[str]:
        """Every text in it, without the white space around; the responses' last texts stand last."""
        messages = [] if isinstance(self.prompt, str) else list(self.prompt)
        for response in self.responses:
            messages += [] if isinstance(response, str) else response[:-1]
        texts = [self.prompt] if isinstance(self.prompt, str) else []
        texts += [message["content"] for message in messages]
        texts += [item if isinstance(item, str) else item[-1]["content"] for item in self.responses]
        return [text.strip() for text in texts]


def in_loss(message: Message) -> bool:
    """Tell whether a turn behind the prompt is in the loss: the assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def read_prompt_responses(reading: RowShape, contract: RecordContract, place: str) -> PromptResponses:
    """Return the prompt and the responses of a row.

    Raises:
        DataError: a column holds something else than it should, a response is empty, or no prompt goes before it.
    """
    row = _RowReader(reading, contract, place)
    if "text" in reading.columns:
        return PromptResponses("", (_filled(row.of("text"), "text", place),), None)
    tools = read_tools(row.of("tools"), row.name("tools"), place)
    if "messages" in reading.columns:
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
    """A row's columns by what they are."""

    def __init__(self, reading: RowShape, contract: RecordContract, place: str) -> None:
        self.reading, self.contract, self.place = reading, contract, place
        self.prompt_inside = False
        """Whether a prompt of text stands aside for the one that the answers begin with."""
        self.set_aside: list[str] = []

    def name(self, what: str) -> str:
        return self.reading.columns.get(what, what)

    def of(self, what: str) -> Any:
        return self.reading.values.get(self.name(what)) if what in self.reading.columns else None

    def answer(self, what: str) -> Any:
        """Return an answer, a text without the prompt at its beginning where the answers repeat it."""
        value = self.of(what)
        return value[len(self.of("prompt")) :] if self.reading.prompt_repeated else value

    def is_chat(self) -> bool:
        """Tell whether any part of the row is more than text."""
        if {"system", "history"} & {*self.reading.columns}:
            return True
        parts = [self.of(name) for name in ("prompt", *self.contract.responses)]
        return self.reading.format == "dialogue" or any(isinstance(part, list | tuple | dict) for part in parts)

    def text_prompt(self) -> str:
        """Return a prompt of text, the instruction's input behind it after an empty line."""
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
        """Return what goes before the first turn in the loss, and the rest; of a labelled conversation only its last turn is."""
        column = self.name("messages")
        turns = self._answered(self._turns("messages"))
        # Assistant turns that nothing comes before answer nothing: they are context.
        asked = next((number for number, turn in enumerate(turns) if turn["role"] != "assistant"), len(turns))
        if 0 < asked < len(turns):
            self.set_aside.append(FIRST)
        learned = [number for number, turn in enumerate(turns) if in_loss(turn) and number >= asked % len(turns)]
        if not learned:
            raise DataError("every assistant turn has weight 0, so none is in the loss", place=self.place)
        for number in learned:
            _check_answer(turns[number], f"{column}[{number}]", self.place)
        first = len(turns) - 1 if "label" in self.contract.required else learned[0]
        return turns[:first], [turns[first:]]

    def _answered(self, turns: list[Message]) -> list[Message]:
        """Return turns without those behind the last answer.

        Raises:
            DataError: no turn is an answer.
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
        """Return the messages of a prompt, and those of each response behind them."""
        answers = [self._answer(name) for name in self.contract.responses]
        raw = self.of("prompt")
        asked: list[Message] = []
        if isinstance(raw, list | tuple):
            asked = read_messages(raw, self.name("prompt"), self.place)
        elif raw is not None:
            asked = [*self._history(), {"role": "user", "content": self.text_prompt()}]
        shared = self._shared(answers) if self.reading.prompt_inside else 0
        if shared:
            before = answers[0][:shared]
            answers = [answer[shared:] for answer in answers]
            if not any(turn["role"] == "user" for turn in before):
                asked = [*before, *asked]
            else:
                repeated = [_says_the_same(*both) for both in zip(asked, before[-len(asked) :], strict=False)]
                if isinstance(raw, list | tuple) and not (len(asked) <= len(before) and all(repeated)):
                    raise DataError(
                        f"the answers hold another prompt than `{self.name('prompt')}`",
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
        """Put the system column before the messages, where it holds anything."""
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
        value = self.of(what)
        if isinstance(value, str) and is_dialogue(value):
            return read_dialogue(value)
        if value_kind(value) == "texts":
            roles: tuple[Role, ...] = ("user", "assistant")
            return [{"role": roles[number % 2], "content": text} for number, text in enumerate(value)]
        return read_messages(value, self.name(what), self.place)

    def _answer(self, name: str) -> list[Message]:
        value = self.answer(name)
        if self.reading.prompt_repeated:
            value = value.lstrip()
        if isinstance(value, str) and not (self.reading.format == "dialogue" and is_dialogue(value)):
            return [{"role": "assistant", "content": _filled(value, self.name(name), self.place)}]
        if not isinstance(value, str) and value_kind(value) not in (*TURNS, "turn", "empty"):
            raise wrong_type(self.name(name), "text or a list of messages", value, self.place)
        return self._turns(name)

    def _history(self) -> list[Message]:
        history = self.of("history")
        if value_kind(history) in (*TURNS, "texts"):
            return self._turns("history")
        turns: list[Message] = []
        for question, answer in history or []:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return turns

    def _shared(self, answers: Sequence[list[Message]]) -> int:
        """Return how many messages the answers begin with in common, up to the answers proper."""
        shared = 0
        while shared < min(map(len, answers)) and all(
            _says_the_same(answer[shared], answers[0][shared]) for answer in answers
        ):
            shared += 1
        if shared == min(map(len, answers)):
            # One of them is the beginning of the other, or they are equal: what they differ in is the last answer.
            shared = max((n for n in range(shared) if answers[0][n]["role"] == "assistant"), default=shared)
        if any(answer[shared]["role"] != "assistant" for answer in answers if shared < len(answer)):
            got = ", ".join(
                f"`{self.name(name)}[{shared}]` is {_shown(answer[shared])}"
                for name, answer in zip(self.contract.responses, answers, strict=True)
            )
            raise DataError(
                f"the answers differ before the assistant speaks, at message {shared}",
                place=self.place,
                got=got,
                fix="give both answers the same prompt, or delete the row",
            )
        return shared


def _repeated(asked: Sequence[Message], answer: Sequence[Message]) -> int:
    """Return how many messages an answer begins with that repeat what is asked, a system turn before it counted in."""
    for skipped in (0, 1):
        end = skipped + len(asked)
        if not asked or len(answer) <= end or (skipped and answer[0]["role"] != "system"):
            return 0
        if all(_says_the_same(*both) for both in zip(asked, answer[skipped:end], strict=True)):
            return end
    return 0


def _says_the_same(one: Message, other: Message) -> bool:
    """Tell whether two turns are alike but for what was noted on them, such as a number or a time."""
    return all(one.get(key) == other.get(key) for key in ("role", "content", "tool_calls"))


def _check_prompt(prompt: Sequence[Message], row: _RowReader, place: str) -> None:
    if not prompt and "messages" in row.reading.columns:
        raise DataError("the conversation begins with an assistant turn, which answers nothing", place=place)
    if not prompt:
        raise DataError("the answers begin with an assistant turn, and there is no prompt before it", place=place)
    # Of a conversation the turns that are kept out of the loss may end on any.
    if prompt[-1]["role"] == "assistant" and "messages" not in row.reading.columns:
        raise DataError(
            "the prompt ends on an assistant turn, which leaves nothing to answer",
            place=place,
            fix="end it on a user turn, and put the answer into its own column",
        )


def _check_response(answer: Sequence[Message], name: str, shared: int, place: str) -> None:
    where = [f"{name}[{number}]" for number in range(shared, shared + len(answer))]
    if not answer:
        raise DataError(f"`{name}` has no answer behind the prompt", place=place)
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
    if turn["content"].strip() or any(
        turn.get(key) for key in ("tool_calls", "function_calls", "reasoning_content", "reasoning", "thinking")
    ):
        return
    raise DataError(f"`{name}` is an empty response", place=place, fix="fill or delete the row")


def _filled(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, "text", value, place)
    if not value.strip():
        raise DataError(f"`{name}` is an empty response", place=place, fix="fill or delete the row")
    return value


def _shown(message: Message) -> str:
    return f"{message['role']}: {shortened(message['content'])}"
