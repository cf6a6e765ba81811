"""Prompts as people give them (texts, chats, rows, files of rows) as rows of the record type `prompt`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.contracts.records import RECORDS, Prompt
from rlhf_core.data.data_source import DataSource, SourcePart
from rlhf_core.data.open_source import SUFFIXES, open_source
from rlhf_core.data.row_checker import CheckedRow, RowChecker
from rlhf_core.data.row_source import COMPRESSION, Cursor, Row, TextFile
from rlhf_core.data.row_values import as_json
from rlhf_core.infra.errors import ConfigError, DataError, shortened
from rlhf_core.infra.model_files import near_path

_LINES = (".txt", *(f".txt{end}" for end in COMPRESSION))
"""Endings of the names of files with one prompt per line."""
_ROLE_KEYS = ("role", "from")
_FORMS = "give texts, chats (lists of messages), rows with a `prompt`, or the path of a file of rows"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt, with the row that it comes from."""

    prompt: Prompt
    """Text, or chat messages."""
    place: str
    """Where it was given, for messages: `file:line`, or `prompts[2]`."""
    tools: list[dict[str, Any]] | None = None
    """Tools that the assistant may call, for the chat template."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row as it was given; a text or a chat alone has no columns."""

    def as_row(self, index: int) -> Row:
        """Return it as a row of the record type `prompt`, without the columns that it was given with."""
        # Their context (a system message, an instruction's input, earlier turns) is in the prompt already.
        values = {"prompt": self.prompt} if self.tools is None else {"prompt": self.prompt, "tools": self.tools}
        return Row(index, self.place, values, Cursor(row=index + 1))


def read_prompts(
    prompts: Any,
    *,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    name: str = "prompts",
    split: str = "train",
    streaming: bool = False,
) -> Iterator[PromptRow]:
    """Yield prompts that were given in any form.

    A text is the path of a file of rows where it ends as such a file's name does (`.jsonl`, `.parquet` …; `.txt` for one prompt
    per line) and has no blank, or the file exists; any other text is a prompt. A folder or a hub name is given as
    `{path: NAME}`. The rows of files may be of any record type: of a conversation or a pair the prompt is all that precedes the
    last answer.

    Args:
        prompts: one prompt or several: a text, a chat (a list of messages), a row, a path, or a list of these.
        limit: most rows to take from each file; None takes all.
        columns: field of the record type → the data's column, as `dataset.columns`; fields that no prompt has are ignored.
        name: what the prompts are called in messages.
        split: which split to take of a hub name, or of a folder whose files come in splits.
        streaming: whether what comes from the hub is streamed, rather than downloaded first.

    Raises:
        DataError: a file can't be read, a row has no prompt, or a prompt is empty.
        ConfigError: what was given is none of these forms, or is empty.
    """
    reader = _RowReader(columns or {})
    items = _items(prompts)
    if not items:
        raise ConfigError("no prompts are given", place=name, got=shortened(prompts), fix=_FORMS)
    for number, item in enumerate(items):
        place = f"{name}[{number}]" if isinstance(prompts, list | tuple) else name
        path = _path(item)
        if path is not None:
            rows: Iterable[Row] = _rows_of(path, split, streaming)
            yield from map(reader.read, itertools.islice(rows, limit))
        elif isinstance(item, str):
            yield _not_blank(PromptRow(item, place))
        elif _is_chat(item):
            yield PromptRow(reader.read(Row(number, place, {"prompt": list(item)}, Cursor()), exact=True).prompt, place)
        elif isinstance(item, Mapping):
            yield reader.read(Row(number, place, item, Cursor()))
        else:
            raise ConfigError("isn't a prompt", place=place, got=shortened(item), fix=_FORMS)


def names_file(text: str) -> bool:
    """Return whether a text is the path of a file of rows: it ends as one does, and has no blank or exists."""
    named = text.casefold().endswith((*SUFFIXES, *_LINES))
    return named and (len(text.split()) == 1 or Path(text).expanduser().is_file())


class PromptLines(TextFile):
    """A file with one prompt per line. Blank lines are skipped."""

    def rows(self, start: Cursor) -> Iterator[Row]:
        """Yield a row with the column `prompt` for each line from `start` on, a cursor of this file."""
        row, line, offset = start.row, start.line, start.offset
        for raw, ended in self.lines(offset):
            line, begin, offset = line + 1, offset, offset + len(raw) + ended
            place = f"{self.name}:{line}"
            text = self.decode(raw, place, begin).removesuffix("\r")
            if text.strip():
                yield Row(row, place, {"prompt": text}, Cursor(start.source, row + 1, line, offset))
                row += 1


def _rows_of(path: str | Path, split: str, streaming: bool) -> Iterator[Row]:
    """Return the rows of a file, folder, pattern or hub name.

    Raises:
        DataError: there is nothing of that name, or it has no rows.
    """
    where = Path(path).expanduser()
    if str(path).casefold().endswith(_LINES) and not where.is_dir():
        if not where.is_file():
            raise DataError("no such file", place=str(path), fix=near_path(where))
        return DataSource([SourcePart([PromptLines(where)])]).rows()
    return open_source(path, split=split, streaming=streaming).rows()


def _items(prompts: Any) -> list[Any]:
    """Return what was given as a list of prompts, of which each may be a file of several."""
    if isinstance(prompts, Mapping) and any(key in prompts for key in _ROLE_KEYS):
        return [[prompts]]  # a chat of one message
    if isinstance(prompts, str | Path | Mapping) or _is_chat(prompts):
        return [prompts]
    return list(prompts) if isinstance(prompts, Sequence) else [prompts]


def _path(item: Any) -> str | Path | None:
    """Return the path or hub name that an item of the prompts is; None where it is a prompt."""
    if isinstance(item, Path) or (isinstance(item, str) and names_file(item)):
        return item
    if isinstance(item, Mapping) and {*item} == {"path"} and isinstance(item["path"], str | Path):
        return item["path"]
    return None


def _is_chat(item: Any) -> bool:
    """Return whether an item is a list of chat messages."""
    return (
        isinstance(item, Sequence)
        and not isinstance(item, str)
        and bool(item)
        and all(isinstance(turn, Mapping) and any(key in turn for key in _ROLE_KEYS) for turn in item)
    )


class _RowReader:
    """Finds the prompt of rows of any record type that has one."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        def known(record: str) -> dict[str, str]:
            fields = {*RECORDS[record].required, *RECORDS[record].optional}
            return {name: column for name, column in columns.items() if name in fields}

        self._prompt = RowChecker("prompt", known("prompt"))
        self._answered = [RowChecker(record, known(record)) for record in ("preference", "sft")]

    def read(self, row: Row, *, exact: bool = False) -> PromptRow:
        """Return a row's prompt: its own, or all that precedes the last answer of its conversation.

        Args:
            exact: its own only.

        Raises:
            DataError: it has none, or an empty one.
        """
        try:
            checked = self._prompt.check(row)
            prompt = checked.prompt
        except DataError:
            found = None if exact else self._before_answer(row)
            if found is None:
                raise
            checked, prompt = found
        return _not_blank(PromptRow(as_json(prompt), row.place, checked.tools, row.values))

    def _before_answer(self, row: Row) -> tuple[CheckedRow, Prompt] | None:
        """Return a row that holds a conversation or a pair, and its prompt; None where it is neither."""
        for checker in self._answered:
            with suppress(DataError):
                checked = checker.check(row)
                if isinstance(checked.prompt, str):
                    return (checked, checked.prompt) if checked.prompt else None
                turns = list(checked.prompt)
                if checker.contract.name == "sft":
                    turns += [turn for turn in checked.responses[0] if not isinstance(turn, str)]
                    turns = turns[: max(n for n, turn in enumerate(turns) if turn["role"] == "assistant")]
                return checked, turns
        return None


def _not_blank(row: PromptRow) -> PromptRow:
    """Return a prompt, refused where it has no text.

    Raises:
        DataError: it has none.
    """
    texts = [row.prompt] if isinstance(row.prompt, str) else [turn.get("content") for turn in row.prompt]
    if not any(not isinstance(text, str) or text.strip() for text in texts):
        raise DataError("the prompt is empty", place=row.place, got=shortened(row.prompt), fix="give it some text")
    return row
