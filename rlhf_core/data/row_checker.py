"""Checks a row against its record type: it has the columns, they have the right types, and no response is empty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_core.contracts.records import RECORDS, Message, Prompt, RecordType
from rlhf_core.data.columns import ASKING, TURNS, is_identifier, value_kind
from rlhf_core.data.label_values import read_label
from rlhf_core.data.messages import is_dialogue, read_dialogue, read_messages, wrong_type
from rlhf_core.data.missing_columns import missing_column
from rlhf_core.data.prompt_responses import PromptResponses, read_prompt_responses
from rlhf_core.data.row_shapes import Format, RowShape, ShapeRecogniser
from rlhf_core.data.row_source import Row, RowEntry
from rlhf_core.data.row_values import as_json, check_sound, is_json
from rlhf_core.infra.errors import ConfigError, DataError, did_you_mean

_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "documents", "chat_template_kwargs")
"""Columns that change what a row means but aren't read here; they are reported unless they are empty."""


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A checked row, before it is encoded."""

    index: int
    place: str
    prompt: Prompt
    """Text, or the messages before the first turn in the loss."""
    responses: tuple[str, ...] | tuple[list[Message], ...]
    """Texts after a prompt of text; after messages the messages that follow, of which the assistant's are in the loss."""
    tools: list[dict[str, Any]] | None = None
    """Tools that the assistant may call, for the chat template."""
    per_prompt: Mapping[str, float] = field(default_factory=dict)
    per_response: Mapping[str, list[bool]] = field(default_factory=dict)
    asked: Prompt = ""
    """The prompt as it is in the data, as JSON values, for rewards: options that change how it is encoded don't change this."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, for methods and rewards, as JSON values."""
    left_out: tuple[str, ...] = ()
    """Columns that aren't in `record` because their values aren't JSON values."""
    read_as: str | None = None
    """Description of which column was read as what; None where all have the record type's names."""
    unused: tuple[str, ...] = ()
    """Columns of text, turns or images that aren't used and don't repeat what is used."""
    set_aside: tuple[str, ...] = ()
    """Warnings on turns that are kept out of the loss because no question precedes them, or no answer follows."""
    absent: tuple[tuple[str, str, str | None], ...] = ()
    """Columns that `dataset.columns` names and the row lacks, each with a suggested fix and, where an entry of `data` names it
    instead, the name of that."""
    entry: str | None = None
    """Name of the entry of `data` that it is of, where there are several."""


class RowChecker:
    """Checks rows against a record type, whatever their shape.

    Args:
        record: name of the record type.
        columns: `dataset.columns`: field of the record type → the data's column.
        format: `dataset.format`: the one shape that is accepted, or `auto` for any.
        ignored: `dataset.ignore_columns`: columns that aren't reported when they are unused.
    """

    def __init__(
        self,
        record: str,
        columns: Mapping[str, str] | None = None,
        *,
        format: Format = "auto",
        ignored: Sequence[str] = (),
    ) -> None:
        if record not in RECORDS:
            raise ConfigError(f"unknown record `{record}`", place="record", fix=did_you_mean(record, RECORDS))
        self.contract: RecordType = RECORDS[record]
        self.columns, self.ignored = dict(columns or {}), {*ignored}
        known = {*self.contract.required, *self.contract.optional}
        for name in self.columns:
            if name not in known:
                raise ConfigError(
                    f"the record type `{record}` has no column `{name}`",
                    place=f"dataset.columns.{name}",
                    fix=did_you_mean(name, known),
                )
        self.recogniser = ShapeRecogniser(self.contract, format, self.columns, self.ignored)
        self._given = (record, self.columns, format, tuple(ignored))
        self._entries: dict[RowEntry, RowChecker] = {}
        self._margin: bool | None = None
        self._earlier: dict[str, str] = {}
        """Field → column of the first row that had every required column; empty before that."""
        self._file: str | None = None
        """The file of the last such row; None where that isn't known."""
        self._earlier_of: dict[str, dict[str, str]] = {}
        """Name of an entry with columns or a format of its own → the same for its rows."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the rows so far had: a margin, or None where there was no row yet; and the columns of complete ones."""
        return {"margin": self._margin, "earlier": self._earlier, "entries": self._earlier_of}

    def reset(self) -> None:
        """Forget the rows so far."""
        self._margin, self._earlier, self._earlier_of = None, {}, {}

    def absorb(self, state: Mapping[str, Any]) -> bool:
        """Go on as after rows that another checker has checked from its beginning; False where they don't follow those so far.

        Args:
            state: of that checker, after those rows.
        """
        margin = state["margin"]
        if margin is not None and self._margin not in (None, margin):
            return False
        self._margin = margin if self._margin is None else self._margin
        self._earlier = self._earlier or state["earlier"]
        self._earlier_of = state["entries"] | self._earlier_of
        return True

    def check(self, row: Row) -> CheckedRow:
        """Return the row's prompt, responses and other columns.

        Raises:
            DataError: a column is missing, of the wrong type, empty, or not a value that can be encoded; or it is ambiguous which
                column is which.
            ConfigError: the row's entry of `data` names a column that the record type doesn't have.
        """
        if row.entry is not None and (row.entry.columns or row.entry.format):
            return self._check_entry(row, row.entry)
        check_sound(row.values, row.place)
        shape = self.recogniser.read(self._renamed(row.values), row.place)
        found, values = shape.columns, shape.values
        check_sound({name: value for name, value in values.items() if value is not row.values.get(name)}, row.place)
        whole = {"messages", "text"} & {*found}
        for name in self.contract.required:
            absent = name not in found and not (whole and name in ("prompt", "response"))
            if absent and not (name == "prompt" and shape.prompt_inside):
                raise self._missing(name, row, found)
        self._earlier, self._file = self._earlier or dict(found), _file_of(row)
        parts = read_prompt_responses(shape, self.contract, row.place)
        per_prompt, per_response = self._columns(shape, row)
        used = {*found.values(), *per_prompt}
        unused = self._unused(shape, parts, used)
        record = {name: value for name, value in values.items() if name not in used}
        if not self.contract.responses:
            # A reward may read any column, under its own name or that of the record type; the prompt isn't among them.
            record = {**values, **{name: values[column] for name, column in found.items()}}
            record = {name: value for name, value in record.items() if name not in ("prompt", found.get("prompt"))}
        kept = {name: value for name, value in record.items() if is_json(value)}
        left_out = tuple(name for name in record if name not in kept)
        return CheckedRow(
            row.index, row.place, parts.prompt, parts.responses, parts.tools,
            per_prompt, per_response, as_json(parts.prompt), kept, left_out, shape.read_as, unused,
            parts.set_aside, self._absent(row), row.entry.name if row.entry is not None else None,
        )  # fmt: skip

    def _check_entry(self, row: Row, entry: RowEntry) -> CheckedRow:
        """Check a row of an entry of `data` that has columns or a format of its own."""
        checker = self._for_entry(entry)
        checker._margin, checker._earlier = self._margin, self._earlier_of.get(entry.name, {})
        checked = checker.check(replace(row, entry=None))
        self._margin = checker._margin
        self._earlier_of[entry.name] = checker._earlier
        own = {name for _, name in entry.columns}
        lacks = tuple((name, fix, entry.name if name in own else None) for name, fix, _ in checked.absent)
        return replace(checked, entry=entry.name, absent=lacks)

    def _for_entry(self, entry: RowEntry) -> RowChecker:
        """Return the checker for the rows of an entry of `data` that has columns or a format of its own."""
        if entry not in self._entries:
            record, columns, format, ignored = self._given
            own: Any = entry.format or format
            self._entries[entry] = RowChecker(record, {**columns, **dict(entry.columns)}, format=own, ignored=ignored)
        return self._entries[entry]

    def _renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's values with the columns that `dataset.columns` names renamed to the record type's fields."""
        renamed = {**values}
        for name, own in self.columns.items():
            if own in values:
                renamed[name] = values[own]
                if own not in self.columns:
                    renamed.pop(own, None)
            else:
                renamed.pop(name, None)
        return renamed

    def _absent(self, row: Row) -> tuple[tuple[str, str, str | None], ...]:
        """Return the columns that `dataset.columns` names and the row lacks, each with a suggested fix."""
        return tuple(
            (own, f"`dataset.columns.{name}`: {did_you_mean(own, map(str, row.values))}", None)
            for name, own in self.columns.items()
            if own not in row.values
        )

    def _unused(self, shape: RowShape, parts: PromptResponses, used: set[str]) -> tuple[str, ...]:
        """Return the columns of text, turns or images that aren't used and don't repeat what is used.

        Args:
            used: columns that are.
        """
        if not self.contract.responses:
            return ()
        values = shape.values
        columns = {name: col for name, col in shape.columns.items() if name != "prompt" or not parts.prompt_inside}
        used = used - {*shape.columns.values()} | {*columns.values()}
        known = {*self.contract.optional} - {"messages", "text", "input", "system", "tools"} | used | self.ignored
        if known.issuperset(values):
            return ()
        texts, same = parts.texts, [values[column] for column in columns.values()]
        answers = parts.texts[-len(parts.responses) :]
        asked = [text for name in ("prompt", "input") if isinstance(text := values.get(columns.get(name, "")), str)]
        asked = [text.strip() for text in asked] or texts[: -len(answers)][-1:]

        def is_rendered(text: str) -> bool:
            """Return whether a text is the whole row written out: it has the prompt, and a response after it."""
            begin = max((text.find(part) + len(part) if part in text else len(text) for part in asked), default=0)
            return any(answer and answer in text[begin:] for answer in answers)

        def repeats(value: Any) -> bool:
            """Return whether a value contains nothing but what is used."""
            if isinstance(value, str):
                if is_dialogue(value) and all(turn["content"] in ("", *texts) for turn in read_dialogue(value)):
                    return True
                return not (text := value.strip()) or text in texts or is_rendered(text)
            if value in same:
                return True
            kind = value_kind(value)
            said = value if kind == "texts" else _contents(value) if kind in TURNS else []
            if bool(said) and all(text.strip() in texts for text in said):
                return True
            # The parts of a text that is used, such as the steps of an answer.
            return bool(said) and _without_space("".join(said)) in map(_without_space, texts)

        def means_something(name: str, value: Any) -> bool:
            """Return whether a value isn't a mere number, such as a score."""
            if isinstance(value, str):
                return name.casefold() in ASKING or not _is_number(value)
            kind = value_kind(value)
            return (
                kind in (*TURNS, "turn")
                or (kind in ("texts", "list") and _holds_text(value))
                or (name.casefold() in _MEDIA and bool(value))
            )

        return tuple(
            name
            for name, value in values.items()
            if name not in known
            and not is_identifier(str(name))
            and means_something(name, value)
            and not repeats(value)
        )

    def _columns(self, shape: RowShape, row: Row) -> tuple[dict[str, float], dict[str, list[bool]]]:
        """Return the columns with one number per prompt (`margin`) and with one value per response (`desirable`)."""
        values, found = shape.values, shape.columns
        per_prompt: dict[str, float] = {}
        per_response: dict[str, list[bool]] = {}
        if "margin" in self.contract.optional:
            margin = values.get("margin")
            margin = None if margin == "" else margin
            if margin is not None:
                per_prompt["margin"] = _number(margin, "margin", row)
            if self._margin is None:
                self._margin = margin is not None
            elif self._margin != (margin is not None):
                raise DataError(
                    "some rows have a `margin` and others don't",
                    place=row.place,
                    fix="give it in every row, or in none",
                )
        if "label" in found:
            per_response["desirable"] = [read_label(values[found["label"]], found["label"], row.place)]
        if "verifiable" in found:
            verifiable = values[found["verifiable"]]
            if str(verifiable).casefold() not in ("true", "false"):
                raise wrong_type("verifiable", "true or false", verifiable, row.place)
            if not isinstance(values["answer"], str | int | float):
                raise wrong_type("answer", "text or a number", values["answer"], row.place)
        return per_prompt, per_response

    def _missing(self, name: str, row: Row, found: Mapping[str, str]) -> DataError:
        """Return the error for a row that lacks the field `name`. `found` is field → column, those that it has."""
        earlier = self._earlier if self._file in (None, _file_of(row)) else {}
        other = None if earlier else self._other_contract(row)
        return missing_column(name, row, found, self.contract, self.columns, earlier=earlier, other=other)

    def _other_contract(self, row: Row) -> str | None:
        """Return the name of another record type with responses whose columns the row has; None where there is none."""
        others = (name for name, contract in RECORDS.items() if contract.responses and name != self.contract.name)
        return fitting_record(row, others)


def _file_of(row: Row) -> str:
    """Return the name of the file or table that a row is of."""
    return row.place.rpartition(":")[0] or row.place.rpartition("[")[0]


def fitting_record(row: Row, records: Iterable[str], columns: Mapping[str, str] | None = None) -> str | None:
    """Return which of some record types a row's columns fit: of several the one that needs most of them; None where none fits.

    Args:
        columns: `dataset.columns`.
    """
    fits = []
    for contract in map(RECORDS.__getitem__, records):
        checker = RowChecker(
            contract.name, {key: own for key, own in (columns or {}).items() if key in _named(contract)}
        )
        try:
            shape = checker.recogniser.read(checker._renamed(row.values), row.place)
        except DataError:
            continue
        optional = ("prompt", "response") if {"messages", "text"} & {*shape.columns} else ()
        inside = ("prompt",) if shape.prompt_inside else ()
        if {*contract.required} <= {*shape.columns, *optional, *inside}:
            fits.append(contract)
    # Rows of `unpaired` have the columns of `sft`, too.
    return max(fits, key=lambda contract: len(contract.required)).name if fits else None


def _named(contract: RecordType) -> set[str]:
    return {*contract.required, *contract.optional}


def _without_space(text: str) -> str:
    return "".join(text.split())


def _number(value: Any, name: str, row: Row) -> float:
    """Return a column's finite number, which may be written as text."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong_type(name, "a number", value, row.place) from None
    if number - number != 0:
        raise DataError(f"`{name}` isn't finite", place=row.place, got=repr(value), fix="repair or delete the row")
    return number


def _contents(turns: Any) -> list[str]:
    """Return the contents of turns; an empty list where they can't be read."""
    try:
        return [message["content"] for message in read_messages(turns, "turns", "")]
    except DataError:
        return []


def _holds_text(value: Any) -> bool:
    """Return whether a value, or one in it, is text other than a number."""
    if isinstance(value, str):
        return bool(value.strip()) and not _is_number(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_holds_text, items))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
