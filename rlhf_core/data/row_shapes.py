"""Recognises the shape of a row (Alpaca, ShareGPT, messages …): which of its columns is the prompt, the response and so on.

Each row is recognised alone, so a stream that resumes reads rows as one that never stopped. The kind of a column's value decides
first, its name then; where two columns fit equally well, the row is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.config.training import RowFormat
from rlhf_core.contracts.records import RecordType
from rlhf_core.data.columns import CHATS, CONVERSATIONS, HISTORY, OTHER_NAMES, TEXT, TURNS, folded_name, value_kind
from rlhf_core.data.messages import (
    ROLES,
    pair_keys,
    read_dialogue,
    read_messages,
    role_key,
    turns_of_columns,
)
from rlhf_core.infra.errors import DataError, shortened

Format = RowFormat
"""Names of the shapes, the values of `dataset.format`."""

_WORDS: dict[str, str] = {
    "columns": "columns",
    "alpaca": "instructions with their input",
    "messages": "chat messages",
    "sharegpt": "ShareGPT conversations",
    "pairs": "conversations of questions with their answers",
    "texts": "texts of the user and the assistant in turn",
    "dialogue": "dialogues of `Human:` and `Assistant:`",
    "text": "text without a prompt, all of it in the loss",
}

_WHOLE_PROMPT = 12
"""Characters that a prompt must have to be recognised at the beginning of a response; shorter ones may begin both by chance."""

_TURNS_IN = ("prompt", "chosen", "rejected")
"""Columns beside those of conversations in which turns may be written as JSON text."""

_PYTHON = re.compile(r"\s*\[\s*\{\s*'(?:role|from|content|value)'\s*:")

_ORDER = (
    "messages", "text", "system", "history", "prompt", "input", "response", "chosen", "rejected", "label", "answer", "verifiable",
    "tools",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowShape:
    """Which columns of a row hold what."""

    format: Format
    columns: Mapping[str, str]
    """Field → the row's column that holds it. A field is one of the record type's, or part of the prompt: `input`, `history`."""
    read_as: str | None
    """Description for the log of which column was read as what; None where every column has the record type's own name."""
    prompt_inside: bool
    """Whether each response is a whole conversation that begins with the prompt."""
    prompt_repeated: bool
    """Whether each response is a text that begins with the whole text of the prompt."""
    values: Mapping[str, Any]
    """The row, with turns that were JSON text decoded."""


class ShapeRecogniser:
    """Recognises rows of one record type.

    Args:
        contract: the record type.
        format: the one shape that is accepted, or `auto` for any.
        given: `dataset.columns`. It is already applied to the rows; messages still need a column's name in the data.
        ignored: `dataset.ignore_columns`: columns that are never taken for a conversation and never contradict one.
    """

    def __init__(
        self, contract: RecordType, format: Format, given: Mapping[str, str], ignored: Iterable[str] = ()
    ) -> None:
        self.contract, self.format, self.given, self.ignored = contract, format, given, {*ignored}

    def read(self, values: Mapping[str, Any], place: str) -> RowShape:
        """Return which columns hold what. Columns that the row lacks are missing from it; `RowChecker` refuses those rows.

        Raises:
            DataError: two columns fit equally well, or the row isn't of the format that was asked for.
        """
        row = _RowColumns(values, self.contract, self.format, self.given, place, self.ignored)
        row.refuse_python()
        found = self._conversation(row) or self._whole_text(row, asked=True) or self._answered(row)
        missing = [name for name in self.contract.required if name not in found]
        if missing and "messages" not in found:
            found = self._whole_text(row) or found
        format = row.format_of(found)
        if self.format == "alpaca" and format == "columns":  # Instructions whose input is null or missing.
            format = "alpaca"
        if self.format not in ("auto", format) and (not missing or {"messages", "text"} & {*found}):
            raise DataError(
                f"isn't a row of the format `{self.format}`",
                place=place,
                got=f"`{format}` ({row.described()})",
                fix="set `dataset.format` to what the rows are, or to `auto`",
            )
        inside, repeated = row.hold_prompts(found), row.repeat_prompt(found)
        return RowShape(format, found, row.read_as(format, found), inside, repeated, row.values)

    def _conversation(self, row: _RowColumns) -> dict[str, str]:
        """Find a column that holds a whole conversation: `messages`, else the only list of turns that ends with an answer.

        A prompt and a response beside it must repeat turns of it; otherwise the row is ambiguous and refused. Where the turns are
        in a column that isn't named like a conversation (few-shot `examples`), the prompt and the response win.

        Returns:
            field → column; empty where there is no conversation.
        """
        if "messages" not in self.contract.optional or self.format not in ("auto", *CHATS):
            return {}
        column = row.own("messages") if "messages" not in self.ignored else None
        asked, answer = None, row.guess("response", (), but=[column]) if column and "response" in row.there else None
        if column is None:
            if "prompt" in row.there and row.find("response", (*TEXT, *TURNS, "turn")) is not None:
                return {}
            column = row.turns(answered=True)
            if column is None:
                return {}
            if self.format == "auto":
                asked, answer = (row.guess(name, TEXT, but=[column]) for name in ("prompt", "response"))
                if asked and folded_name(column) in HISTORY:
                    return {}
                answer = answer if asked else None
            if answer and folded_name(column) not in CONVERSATIONS:
                return {}
        if self.format == "auto" and answer and not row.holds(column, asked, answer):
            raise row.either(column, answer)
        return row.with_context({"messages": column}, [name for name in self.contract.required if name == "label"])

    def _answered(self, row: _RowColumns) -> dict[str, str]:
        """Find the columns of the prompt, the responses, and the record type's other columns. Returns field → column."""
        found: dict[str, str] = {}
        for name in self.contract.responses:
            row.add(found, name, (*TEXT, *TURNS, "turn"))
        inside = row.hold_prompts(found)
        if not inside or "prompt" in row.there:
            row.add(found, "prompt", (*TEXT, *TURNS))
        if "prompt" not in found and not inside and (column := row.turns(but=found.values())) is not None:
            found["prompt"] = column
        return row.with_context(
            found, [name for name in self.contract.required if name not in found and name != "prompt"]
        )

    def _whole_text(self, row: _RowColumns, *, asked: bool = False) -> dict[str, str]:
        """Find a column that is the whole row: `text`, or the only dialogue. Returns field → column, empty where there is none.

        Args:
            asked: only if `dataset.format` names this shape; otherwise only if the row has neither a prompt nor a response.
        """
        column = row.own("text", TEXT) or row.only_dialogue()
        if "text" not in self.contract.optional or column is None:
            return {}
        dialogue = row.kind(column) == "dialogue"
        if asked or self.format != "auto":
            wanted = self.format == "text" or (self.format == "dialogue" and dialogue)
            return ({"text": column} if self.format == "text" else {"messages": column}) if wanted else {}
        if any(row.own(name) for name in ("prompt", "response", "chosen", "rejected")):
            return {}
        return {"messages": column} if dialogue else {"text": column}


class _RowColumns:
    """The columns of one row with the kinds of their values, and the questions that recognising it asks of them."""

    def __init__(
        self,
        values: Mapping[str, Any],
        contract: RecordType,
        format: Format,
        given: Mapping[str, str],
        place: str,
        ignored: set[str],
    ) -> None:
        self.values = _decoded(values)
        self.contract, self.format, self.given, self.place, self.ignored = contract, format, given, place, ignored
        self.kinds = {str(name): value_kind(value) for name, value in self.values.items()}
        self.there = {name for name, kind in self.kinds.items() if kind != "null"}
        self.folded = {folded_name(name): name for name in reversed(self.kinds) if name in self.there}

    def refuse_python(self) -> None:
        """Raise `DataError` where turns were written by Python's `str()`, which isn't JSON."""
        for name, value in self.values.items():
            if (
                isinstance(value, str)
                and _PYTHON.match(value)
                and folded_name(str(name)) in (*CONVERSATIONS, *_TURNS_IN)
            ):
                raise DataError(
                    f"`{self.shown(str(name))}` was written by Python's str()",
                    place=self.place,
                    got=shortened(value),
                    fix="write it as JSON (`json.dumps`), or save the rows as .jsonl or .parquet",
                )

    def kind(self, column: str) -> str:
        """Return the kind of a column's value (see `value_kind`); `null` where there is no such column."""
        return self.kinds.get(column, "null")

    def shown(self, column: str) -> str:
        """Return a column's name in the data, for messages, where `dataset.columns` renamed it."""
        return self.given.get(column, column)

    def own(self, name: str, kinds: Iterable[str] = ()) -> str | None:
        """Return the column of that name, in capitals or not, if its value is of one of `kinds` (where empty: isn't null)."""
        column = name if name in self.there else self.folded.get(name)
        return column if column is not None and (not kinds or self.kind(column) in kinds) else None

    def find(self, name: str, kinds: Iterable[str] = (), *, but: Iterable[str] = ()) -> str | None:
        """Return the column for the field `name`: the one of that name, else the only one that has another name of it.

        Args:
            kinds: kinds of value that the column may hold; any where empty.
            but: columns that hold another field already.

        Raises:
            DataError: several columns have another name of the field.
        """
        if (own := self.own(name, () if name in self.there else kinds)) is not None:
            return own
        taken = {*self.contract.required, *self.given, *but}
        others = [self.folded[other] for other in OTHER_NAMES.get(name, ()) if other in self.folded]
        others = [column for column in others if column not in taken and (not kinds or self.kind(column) in kinds)]
        if name == "prompt" and (len(others) > 1 or self.lacks_instruction()):
            others = [column for column in others if folded_name(column) != "input"]
        if len(others) > 1:
            raise self._ambiguous(others, name)
        return others[0] if others else None

    def lacks_instruction(self) -> bool:
        """Return whether a column for the prompt is null, so that an `input` beside it isn't the prompt."""
        asking = {*OTHER_NAMES["prompt"]} - {"input", "inputs"}
        return any(kind == "null" and folded_name(name) in asking for name, kind in self.kinds.items())

    def guess(self, name: str, kinds: Iterable[str], *, but: Iterable[str | None]) -> str | None:
        """Return what `find` returns, but None where several columns fit or `dataset.ignore_columns` lists the field."""
        if name in self.ignored:
            return None
        try:
            return self.find(name, kinds, but=[*(column for column in but if column), *self.ignored])
        except DataError:
            return None

    def holds(self, column: str, asked: str | None, answer: str) -> bool:
        """Return whether the conversation in `column` contains the response of `answer`, after the prompt of `asked` if given."""
        turns = self.values[column]
        if self.kind(column) not in TURNS or not isinstance(self.values[answer], str):
            return False
        said = [(turn["role"], turn["content"].strip()) for turn in read_messages(turns, column, self.place)]
        wanted = [("assistant", self.values[answer].strip())]
        if asked is not None:
            wanted.insert(0, ("user", self.values[asked].strip()))
        return any(said[at : at + len(wanted)] == wanted for at in range(len(said)))

    def either(self, column: str, answer: str) -> DataError:
        """Return the error for a row with a conversation in `column` and a response in `answer` that isn't part of it."""
        return DataError(
            f"has a conversation in `{column}` and another response in `{answer}`",
            place=self.place,
            fix="say which to imitate: set `dataset.format` to `columns` or `messages` (`sharegpt`, `pairs`), or list the other"
            " in `dataset.ignore_columns`",
        )

    def add(self, found: dict[str, str], name: str, kinds: Iterable[str] = ()) -> None:
        """Add the column for the field `name` to `found`, where the row has one."""
        column = self.find(name, kinds, but=found.values())
        if column is not None:
            found[name] = column

    def with_context(self, found: dict[str, str], names: Iterable[str]) -> dict[str, str]:
        """Return `found` with the columns of the fields `names`, and of system, tools, input and history."""
        for name in names:
            self.add(found, name)
        self.add(found, "system", TEXT)
        self.add(found, "tools")
        prompt = found.get("prompt")
        if prompt is None or self.kind(prompt) not in TEXT:
            return found
        # A column `prompt` is the whole prompt; an instruction or a question may have an input beside it.
        instructs = self.format == "auto" and self.shown(prompt).casefold() not in ("prompt", "input", "inputs")
        if instructs or self.format == "alpaca" or "input" in self.given:
            self.add(found, "input", TEXT)
        history = next((self.folded[name] for name in HISTORY if name in self.folded), None)
        if history is not None and history not in self.ignored and _is_history(self.values[history]):
            found["history"] = history
        return found

    def turns(self, *, answered: bool = False, but: Iterable[str] = ()) -> str | None:
        """Return the column that holds turns: one named like a conversation, else the only one of that kind.

        Args:
            answered: whether the turns must end with an answer.
            but: columns that aren't considered.

        Raises:
            DataError: several columns hold turns and none is named like a conversation.
        """
        apart = {"chosen", "rejected", *but, *self.ignored}
        lists = [
            name
            for name, kind in self.kinds.items()
            if kind in TURNS and name not in apart and not (answered and not _answers(self.values[name][-1]))
        ]
        named = [self.folded[name] for name in OTHER_NAMES["messages"] if name in self.folded]
        named = [name for name in named if name not in apart and self.kind(name) in (*CHATS, "empty")]
        if named:
            return named[0]
        if len(lists) > 1:
            lists = [name for name in lists if folded_name(name) not in HISTORY]
        if len(lists) > 1:
            raise self._ambiguous(lists, "messages")
        return lists[0] if lists else None

    def only_dialogue(self) -> str | None:
        """Return the column that holds a dialogue; None where none or several do."""
        dialogues = [name for name, kind in self.kinds.items() if kind == "dialogue"]
        return dialogues[0] if len(dialogues) == 1 else None

    def hold_prompts(self, found: Mapping[str, str]) -> bool:
        """Return whether both responses of a pair contain the prompt: turns that begin with a question, or whole dialogues."""
        answers = [found[name] for name in self.contract.responses if name in found]
        if len(answers) < 2:
            return False
        kinds = {self.kind(column) for column in answers}
        if kinds == {"dialogue"}:
            if self.format not in ("auto", "dialogue"):
                return False
            # Where there is a prompt column and the dialogues begin differently, they are answers to it, and don't contain it.
            return self.own("prompt") is None or _begin_alike(self.values[column] for column in answers)
        return kinds <= set(TURNS) and any(
            self.kind(column) == "pairs" or not _answers(self.values[column][0]) for column in answers
        )

    def repeat_prompt(self, found: Mapping[str, str]) -> bool:
        """Return whether every response is a text that begins with the whole text of the prompt and continues after it."""
        prompt = self.values.get(found.get("prompt", ""))
        answers = [self.values[found[name]] for name in self.contract.responses if name in found]
        if not isinstance(prompt, str) or len(prompt.strip()) < _WHOLE_PROMPT or not answers:
            return False
        if "input" in found and str(self.values[found["input"]]).strip():
            return False
        return not self.hold_prompts(found) and all(
            isinstance(answer, str) and answer.startswith(prompt) and answer[len(prompt) :].strip()
            for answer in answers
        )

    def format_of(self, found: Mapping[str, str]) -> Format:
        """Return the shape of a row in which `found` (field → column) was found."""
        if "text" in found:
            return "text"
        known = [name for name in ("messages", "prompt", *self.contract.responses) if name in found]
        kinds = {self.kind(found[name]) for name in known}
        turns = next((kind for kind in CHATS if kind in kinds), None)
        if "messages" in found:
            return "dialogue" if "dialogue" in kinds else turns or "messages"
        if turns is not None:
            return turns
        if "dialogue" in kinds and self.hold_prompts(found):
            return "dialogue"
        if "turn" in kinds:
            return "messages"
        instructs = (
            "history" in found and self.shown(found["prompt"]).casefold() != "prompt" and self.format != "columns"
        )
        return "alpaca" if "input" in found or instructs else "columns"

    def read_as(self, format: Format, found: Mapping[str, str]) -> str | None:
        """Return a description of which column was read as what; None where all have the record type's names or the user's."""
        own = all(name == column for name, column in found.items())
        words_for_label = self._label_form(found)
        repeated = self.repeat_prompt(found)
        plain = format in ("columns", "messages") and own and words_for_label is None
        if plain and not repeated and not self.hold_prompts(found):
            return None
        parts = []
        for name in sorted(found, key=_ORDER.index):
            column = found[name]
            shown = self.shown(column)
            text = f"`{shown}`"
            if name == "label" and words_for_label is not None:
                text += f" ({words_for_label})"
            if name not in (shown, "messages", "text"):
                text += f" as {name}"
            if format != "columns" or text != f"`{shown}`":
                parts.append(text)
        inside = ", with their prompts inside" if "prompt" not in found and self.hold_prompts(found) else ""
        inside += ", without the prompt that the answers begin with" if repeated else ""
        one = "column " if len(parts) == 1 and format != "columns" else ""
        return f"{_WORDS[format]}{inside}" + (f": {one}{', '.join(parts)}" if parts else "")

    def _label_form(self, found: Mapping[str, str]) -> str | None:
        """Return how the label is written, where it isn't `desirable` or `undesirable`."""
        label = self.values[found["label"]] if "label" in found else "desirable"
        if isinstance(label, bool):
            return "true or false"
        if isinstance(label, int | float):
            return "1 or 0"
        return None if label in ("desirable", "undesirable") else "in words"

    def described(self) -> str:
        """Return the row's columns with the kinds of their values, for a message."""
        words = {"dialogue": "text", "turn": "one message", "empty": "an empty list"}
        words |= {kind: f"a list of {_WORDS[kind]}" for kind in CHATS}
        named = [f"`{self.shown(name)}` ({words.get(kind, kind)})" for name, kind in self.kinds.items()]
        return ", ".join(named) or "no columns"

    def _ambiguous(self, columns: list[str], name: str) -> DataError:
        """Return the error for a row in which several columns could be the field `name`."""
        return DataError(
            f"{' and '.join(f'`{column}`' for column in columns)} could each be the `{name}`",
            place=self.place,
            got=self.described(),
            fix=f"say which by `dataset.columns`, such as `{{{name}: {columns[0]}}}`",
        )


def _decoded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with turns that are JSON text decoded, as CSV files have them, or columns, as `datasets` has sequences.

    These may be prompts and conversations, and the responses beside them. An `input` that is a request with `messages` and
    `tools`, as in OpenAI's preference files, is replaced by columns `prompt` and `tools`.
    """
    result = {name: turns_of_columns(value) for name, value in values.items()}
    request = result.get("input")
    if isinstance(request, Mapping) and value_kind(request.get("messages")) in TURNS and "prompt" not in result:
        result |= {"prompt": request["messages"], **({"tools": request["tools"]} if "tools" in request else {})}
        del result["input"]
    names = {str(name): folded_name(str(name)) for name in result}
    asked = [name for name, folded in names.items() if folded in (*_TURNS_IN, *OTHER_NAMES["messages"])]
    for name in asked:
        result[name] = _turns_in(result[name])
    if any(result[name] is not values.get(name) for name in asked):
        for name, folded in names.items():
            if folded in ("response", *OTHER_NAMES["response"]):
                result[name] = _turns_in(result[name])
    return result


def _turns_in(value: Any) -> Any:
    """Return turns decoded where a text is the JSON of some, else the value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            turns = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return turns if value_kind(turns) in TURNS else value
    return value


def _answers(turn: Any) -> bool:
    """Return whether a turn is the assistant's, or a pair of a question and its answer."""
    if not isinstance(turn, Mapping):
        return False
    key = role_key(turn)
    return pair_keys(turn) is not None if key is None else ROLES.get(turn[key].casefold()) in ("assistant", "call")


def _begin_alike(dialogues: Iterable[str]) -> bool:
    """Return whether the first turns of all dialogues are equal."""
    return len({read_dialogue(text)[0]["content"] for text in dialogues}) == 1


def _is_history(value: Any) -> bool:
    """Return whether a value is earlier turns: pairs of question and answer, messages, or texts of both in alternation."""
    kind = value_kind(value)
    if kind != "list":
        return kind in TURNS or (kind == "texts" and len(value) % 2 == 0)
    return all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in value
    )
