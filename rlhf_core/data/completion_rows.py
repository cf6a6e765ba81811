"""Rows that hold completions already, of any shape, as samples for rewards: each row's completions with their prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_core.contracts.records import Prompt
from rlhf_core.contracts.reward import Sample
from rlhf_core.data.columns import CONVERSATIONS, OTHER_NAMES
from rlhf_core.data.messages import wrong_type
from rlhf_core.data.open_source import open_source
from rlhf_core.data.row_checker import RowChecker
from rlhf_core.data.row_source import Row
from rlhf_core.data.row_values import as_json, check_sound
from rlhf_core.infra.errors import DataError, did_you_mean

FIELDS = ("prompt", "completion", "completions", "chosen", "rejected", "response", "messages")
"""What a column can be named as, with `columns`."""
_OF_COMPLETIONS = {"completion_ids", "stop_reason", "stop_reasons", "tokens", "logprobs", "raw_logprobs", *FIELDS}
"""Columns that describe a row's completions, and aren't passed to rewards as columns of the row."""

_REFERENCES = ("answer", "solution", "target", "targets")
"""Other names of a response that in rows to be scored are those of what a completion is compared with."""
_ANSWERED = {"response", "text", *CONVERSATIONS, *OTHER_NAMES["response"]} - {*_REFERENCES}
"""Names of columns that hold a completion."""


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """One row, and the samples in it."""

    index: int
    """Number of the row in its data, from 0."""
    place: str
    """Where it is, for messages: `file:line`."""
    columns: Mapping[str, Any]
    """Its columns as JSON values."""
    shape: Literal["one", "several", "pair"]
    """Whether it holds one completion, a list of them, or a chosen and a rejected one."""
    samples: Sequence[Sample]


def read_completion_rows(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    split: str = "train",
) -> Iterator[CompletionRow]:
    """Yield the rows of data whose rows hold completions.

    A row has a `prompt` (text or chat messages) with a `completion`, or `completions` (a list), as `rlhf sample` writes; or it is
    of the record type `sft` (a prompt with its response, a conversation, whose last answer is the completion) or `preference`.

    Args:
        data: whatever `open_source` opens: files, a folder, a hub name, a list of rows.
        columns: `prompt`, `completion` … → the data's own name for it.
        limit: most rows; None for all.
        split: which split to take, where the data come in splits.

    Raises:
        DataError: a row has no completion, or no prompt.
    """
    reader = _Reader(columns or {})
    for row in itertools.islice(open_source(data, split=split).rows(), limit):
        yield reader.read(row)


class _Reader:
    def __init__(self, columns: Mapping[str, str]) -> None:
        for name in columns:
            if name not in FIELDS:
                raise DataError(
                    f"no column can be named as `{name}`", place=f"columns.{name}", fix=did_you_mean(name, FIELDS)
                )
        self._columns = dict(columns)
        self._prompt, self._pair, self._sft = (
            RowChecker(record, _known(record, columns)) for record in ("prompt", "preference", "sft")
        )

    def read(self, row: Row) -> CompletionRow:
        """Return a row with its completions.

        Raises:
            DataError: it has none, or no prompt; the fix names the option `columns`, which is `dataset.columns` in training.
        """
        try:
            return self._read(row)
        except DataError as error:
            fix = error.fix and error.fix.replace("`dataset.columns`", "`columns`")
            raise DataError(error.problem, place=error.place, got=error.got, fix=fix) from error

    def _read(self, row: Row) -> CompletionRow:
        check_sound(row.values, row.place)
        values = row.values
        several, one = (values.get(self._columns.get(name, name)) for name in ("completions", "completion"))
        if several is not None:
            texts = self._texts(several, row)
            return self._row(row, "several", self._prompt.check(row).asked, texts, self._described(values, len(texts)))
        if one is not None:
            if not isinstance(one, str):
                raise wrong_type(self._columns.get("completion", "completion"), "text", one, row.place)
            return self._row(row, "one", self._prompt.check(row).asked, [one], self._described(values, None))
        if self._columns.get("chosen", "chosen") in values:
            checked = self._pair.check(row)
            answers = [_last_answer(checked.prompt, response) for response in checked.responses]
            return self._row(row, "pair", answers, [answer for _, answer in answers])
        checked = self._sft.check(row)
        self._check_no_reference(row)
        prompt, answer = _last_answer(checked.prompt, checked.responses[0])
        return self._row(row, "one", prompt, [answer])

    def _check_no_reference(self, row: Row) -> None:
        """Refuse a row whose only response is its reference answer: it would be scored against itself.

        Raises:
            DataError: it is one, and `columns` doesn't say that it is the response.
        """
        if "response" in self._columns or "messages" in self._columns or row.values.keys() & _ANSWERED:
            return
        if reference := next((name for name in _REFERENCES if name in row.values), None):
            raise DataError(
                f"has no completion: `{reference}` is read as the reference answer",
                place=row.place,
                fix=f"score what `rlhf sample` wrote, or `--columns.response {reference}` scores that column",
            )

    def _texts(self, several: Any, row: Row) -> list[str]:
        name = self._columns.get("completions", "completions")
        if not isinstance(several, list | tuple) or not all(isinstance(text, str) for text in several):
            raise wrong_type(name, "a list of texts", several, row.place)
        if not several:
            raise DataError(f"`{name}` is an empty list", place=row.place, fix="delete the row, or fill it")
        return list(several)

    def _described(self, values: Mapping[str, Any], count: int | None) -> list[dict[str, Any]]:
        """Return for each completion why it ended and its ids, where the row has these.

        Args:
            count: how many completions a list holds; None where the columns hold one.
        """
        reasons = values.get("stop_reason" if count is None else "stop_reasons")
        ids = values.get("completion_ids")
        found: list[dict[str, Any]] = []
        for number in range(count or 1):
            reason = reasons if count is None else _item(reasons, number, count)
            own = ids if count is None else _item(ids, number, count)
            found.append(
                ({"stop_reason": reason} if isinstance(reason, str) else {})
                | ({"completion_ids": own} if isinstance(own, list) else {})
            )
        return found

    def _row(
        self,
        row: Row,
        shape: Literal["one", "several", "pair"],
        prompt: Any,
        texts: Sequence[str],
        described: Sequence[Mapping[str, Any]] = (),
    ) -> CompletionRow:
        """Return a row with its samples; `prompt` is of all of them, of a pair a list of (prompt, answer)."""
        columns = {str(name): as_json(value) for name, value in row.values.items()}
        own = {self._columns.get(name, name) for name in _OF_COMPLETIONS}
        passed = {name: value for name, value in columns.items() if name not in own}
        samples = [
            Sample(
                as_json(prompt[number][0] if shape == "pair" else prompt),
                text,
                columns=passed,
                group=row.index,
                **(described[number] if described else {}),
            )
            for number, text in enumerate(texts)
        ]
        return CompletionRow(row.index, row.place, columns, shape, samples)


def _known(record: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Return those of the named columns that a record type has."""
    fields = {"prompt": ("prompt",), "preference": ("prompt", "chosen", "rejected")}
    return {
        name: own for name, own in columns.items() if name in fields.get(record, ("prompt", "response", "messages"))
    }


def _item(values: Any, number: int, count: int) -> Any:
    """Return an entry of a list with one entry per completion; None where it is no such list."""
    return values[number] if isinstance(values, list | tuple) and len(values) == count else None


def _last_answer(prompt: Prompt, response: Any) -> tuple[Prompt, str]:
    """Return what precedes the last answer of the assistant, and the answer's text."""
    if isinstance(prompt, str):
        return prompt, str(response)
    turns = [*prompt, *response]
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last], turns[last]["content"]
