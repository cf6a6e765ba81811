"""What is said of a row that lacks a column: that it is null, which other column may be meant, or what the row needs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.contracts.records import RecordType
from rlhf_core.data.columns import (
    CONVERSATIONS,
    KNOWN,
    OTHER_NAMES,
    TEXT,
    TURNS,
    folded_name,
    is_identifier,
    value_kind,
)
from rlhf_core.data.label_values import label_of
from rlhf_core.data.row_source import Row
from rlhf_core.infra.errors import DataError, nearest

SHAPES = {
    **dict.fromkeys(("prompt", "response", "chosen", "rejected"), (*TEXT, *TURNS, "turn")),
    "label": (*TEXT, "number"),
    "answer": (*TEXT, "number"),
    "verifiable": (*TEXT, "number"),
}
"""Field of a record type → kinds of value that it may have."""

_ASIDE = frozenset((
    "url", "uri", "link", "path", "file", "filename", "source", "origin", "dataset", "split", "subset", "config",
    "category", "categories", "topic", "subject", "domain", "task", "tag", "tags", "type", "kind", "level",
    "difficulty", "lang", "language", "locale", "country", "license", "model", "model_name", "author", "annotator",
    "timestamp", "time", "date", "created", "updated", "year", "score", "scores", "rating", "rank", "reward", "votes",
    "upvotes", "length", "tokens", "num_tokens", "version", "status", "meta", "metadata",
))  # fmt: skip
"""Names of columns about a row, which are neither what is asked nor an answer."""
_ASIDE_ENDS = ("_url", "_at", "_score", "_type", "_model")
_GRADES = ("score", "rating", "reward", "votes", "upvotes", "rank", "stars", "grade", "quality")
"""Names of columns whose numbers say how good an answer is."""
_WHICH = ("preference", "preferred", "winner", "better", "best", "choice", "chosen_index", "label")
"""Names of columns that say which of two answers is the better one."""

_TABLE = re.compile(r"\.(csv|tsv)(\.\w+)?:\d+$", re.IGNORECASE)
"""Matches the place of a row of a table in a text file."""
_NO_NAME = re.compile(r"^[\d.,+-]+$|[.?!]$|^.{60,}$")
"""Matches what is no column's name: numbers, sentences."""

_ROLES = {
    field: frozenset((field, *OTHER_NAMES.get(field, ()))) for field in ("prompt", "response", "chosen", "rejected")
}
_ROLES["response"] |= {"answer"}


def missing_column(
    name: str,
    row: Row,
    found: Mapping[str, str],
    contract: RecordType,
    columns: Mapping[str, str],
    *,
    earlier: Mapping[str, str],
    other: str | None,
) -> DataError:
    """Return the error for a row that lacks a field.

    Args:
        name: the field of the record type.
        found: field → column, those that the row has.
        columns: `dataset.columns`.
        earlier: field → column of an earlier row that had all of them; empty where there is none.
        other: another record type that the row's columns fit.
    """
    own = columns.get(name, name)
    asked = _MissingColumn(name, own, row, found, contract, columns)
    # A whole conversation or text stands for the prompt and the response.
    before = next((earlier[key] for key in (name, "messages", "text") if key in earlier), None)
    if (null := asked.null(before)) is not None:
        meant = "" if own == name or null != own else f", from which `dataset.columns` takes `{name}`,"
        filled = [f"`{key}`" for key, value in row.values.items() if value is not None]
        others = f"; the columns that it fills are {', '.join(filled)}" if filled else ""
        problem = f"column `{null}`{meant} is null in this row"
        whole = asked.whole_input()
        instead = f", or {_set({'prompt': whole})} if that is the whole prompt" if whole is not None else ""
        return DataError(problem, place=row.place, fix=f"fill it{instead}, or delete the row{others}")
    fix = asked.fix()
    if own != name and value_kind(row.values.get(name)) in SHAPES[name]:
        fix = f"leave `{name}` out of `dataset.columns`: the row has a column of that name"
    elif before is not None:
        fix = "the rows before have it: fill or delete this one"
        own = before if own == name else own
    elif (seen := hint_of_row(row)) is not None:
        fix = seen
    elif other is not None:
        look = f"these look like `{other}` rows, for another method"
        fix = f"{fix}; or {look}" if name == "label" and asked.candidates() else f"{look}; or {fix}"
    return DataError(
        f"no column `{own}`, which the record type `{contract.name}` needs",
        place=row.place,
        got=f"columns {_described(row) or 'none'}",
        fix=fix,
    )


class _MissingColumn:
    """A field that a row lacks, and what may be meant by it."""

    def __init__(
        self,
        name: str,
        own: str,
        row: Row,
        found: Mapping[str, str],
        contract: RecordType,
        columns: Mapping[str, str],
    ) -> None:
        self.name, self.own, self.found, self.contract, self.columns = name, own, found, contract, columns
        self.values: dict[str, Any] = {str(key): value for key, value in row.values.items()}
        self.kinds = {key: value_kind(value) for key, value in self.values.items()}

    def null(self, before: str | None) -> str | None:
        """Return the column that is there for the field and is null, if any.

        Args:
            before: the column in which an earlier row has the field.
        """
        if self.own in self.values:
            return self.own
        if self.own == self.name and before in self.values and self.values[before] is None:
            return before
        names = {*OTHER_NAMES.get(self.name, ())}
        if self.name == "prompt":  # Neither is there a whole conversation.
            names |= CONVERSATIONS | ({"text"} & {*self.contract.optional})
            # An instruction has no input where it needs none.
            names -= {"input"} if self.candidates() else set()
        nulls = [key for key, value in self.values.items() if value is None and folded_name(key) in names]
        return nulls[0] if nulls and self.own == self.name else None

    def whole_input(self) -> str | None:
        """Return the column `input` that is filled where the prompt is null."""
        if self.name != "prompt" or self.own != self.name:
            return None
        filled = [key for key, kind in self.kinds.items() if folded_name(key) == "input" and kind in TEXT]
        return next((key for key in filled if str(self.values[key]).strip()), None)

    def candidates(self) -> list[str]:
        """Return the columns that may be meant: of the right kind, and named neither like another field nor like a note."""
        taken = {
            *self.contract.required, *self.contract.optional, *self.columns.values(), *self.found.values()
        }  # fmt: skip
        free = [key for key, kind in self.kinds.items() if key not in taken and kind in SHAPES[self.name]]
        free = [key for key in free if not _is_aside(key, self.name) and not _is_anothers(key, self.name)]
        if self.name == "label":
            free = [key for key in free if label_of(self.values[key]) is not None]
        if self.name == "verifiable":
            free = [key for key in free if str(self.values[key]).casefold() in ("true", "false")]
        return free

    def fix(self) -> str:
        """Return a suggested fix: the `dataset.columns` that would name one of the right kind, else what the row needs."""
        if self.own != self.name and self.own not in self.kinds:
            # `dataset.columns` names a column that the row lacks: suggest the nearest name of a column of the right kind.
            near = nearest(self.own, [key for key, kind in self.kinds.items() if kind in SHAPES[self.name]])
            if near == self.name:
                return f"leave `{self.name}` out of `dataset.columns`: the row has a column of that name"
            if near is not None:
                return _set({self.name: near})
        missing = [self.name, *(column for column in self.contract.responses if column not in (self.name, *self.found))]
        if self.name not in ("prompt", *self.contract.responses):
            return self._other_field()
        free = self.candidates()
        if self.name == "response" and "chosen" in self.values and not free:
            return _set({"response": "chosen"})
        if "rejected" in missing and (which := self._says_which()) is not None:
            return f"`{which}` says which answer is the better one: write that one as `chosen`, the other as `rejected`"
        if len(missing) > 1:
            return self._several(missing, free)
        if (slip := nearest(self.own, free)) is not None:
            return self._meant(slip)
        if len(free) == 1:
            return _set({self.name: free[0]})
        return _set({self.name: "COLUMN"}, free) if free else self._given([self.own])

    def _meant(self, column: str) -> str:
        """Return the fix where a column's name is nearly that of the field."""
        return f"did you mean `{self.own}` by `{column}`? rename it, or {_set({self.name: column})}"

    def _several(self, missing: Sequence[str], free: Sequence[str]) -> str:
        """Return the fix where several fields are missing, the prompt or both answers of a pair among them."""
        near = {name: nearest(name, free) for name in missing}
        if all(near.values()) and len({*near.values()}) == len(missing):
            return _set({name: str(column) for name, column in near.items()})
        texts = [key for key in free if self.kinds[key] in TEXT]
        if self.name == "prompt" and len(texts) == 1 and "text" in self.contract.optional:
            return f"{_set({'text': texts[0]})} to train on all of it, or give a prompt and a response"
        return _set(dict.fromkeys(missing, "COLUMN"), free) if len(free) >= len(missing) else self._given(missing)

    def _other_field(self) -> str:
        """Return the fix for a field that is neither the prompt nor a response."""
        free = self.candidates()
        switches = [key for key in free if isinstance(self.values[key], bool)]
        if (slip := nearest(self.own, free)) is not None:
            return self._meant(slip)
        near = (switches if len(switches) == 1 else [None])[0]
        near = free[0] if near is None and len(free) == 1 else near
        if near is not None or free:
            return _set({self.name: near}) if near is not None else _set({self.name: "COLUMN"}, free)
        if self.name == "verifiable":
            return f"give each row a `{self.own}`, true or false"
        if self.name != "label":
            return f"give each row a `{self.own}`"
        grades = [key for key, kind in self.kinds.items() if kind == "number" and folded_name(key) in _GRADES]
        by = f"; `{grades[0]}` may decide it, by a threshold" if grades else ""
        return f"give each row a `{self.own}`, `desirable` or `undesirable`{by}"

    def _given(self, missing: Sequence[str]) -> str:
        """Return that each row must be given some fields, and where they may come from."""
        lists = [
            key
            for key, value in self.values.items()
            if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)
            if not _is_aside(key, self.name)
        ]
        if lists and {*missing} == {"chosen", "rejected"}:
            return f"`{lists[0]}` is a list of answers: write the better one as `chosen`, the worse one as `rejected`"
        if lists and [*missing] == ["response"]:
            return f"`{lists[0]}` is a list: write one of its texts as `response`"
        named = [f"a `{name}`" for name in missing]
        return f"give each row {' and '.join(filter(None, [', '.join(named[:-1]), named[-1]]))}"

    def _says_which(self) -> str | None:
        """Return the column that says which of two other columns of text is the better answer, if any."""
        for key, value in self.values.items():
            short = isinstance(value, bool | int) or (isinstance(value, str) and len(value) < 12 and " " not in value)
            texts = [k for k in self.values if self.kinds[k] in TEXT and k not in (key, self.found.get("prompt"))]
            if folded_name(key) in _WHICH and short and len(texts) > 1:
                return key
        return None


def hint_of_row(row: Row) -> str | None:
    """Return what may be wrong with a whole row that lacks columns.

    A table's first line is a row, the columns are inside one, or the row is token ids.

    None where nothing of these can be seen.
    """
    names = [str(key) for key in row.values]
    if "input_ids" in names and not any(folded_name(name) in KNOWN for name in names):
        return "these rows are token ids already: give the texts that they were made from"
    known = any(folded_name(name) in KNOWN for name in names)
    if _TABLE.search(row.place) and not known and any(_NO_NAME.search(name) for name in names):
        return "the first line of such a file names the columns, as `prompt,response` does: write one above the rows"
    for name, value in row.values.items():
        inside = [str(key) for key in value if folded_name(str(key)) in KNOWN] if isinstance(value, Mapping) else []
        if len(inside) > 1 and not any(folded_name(other) in KNOWN for other in names if other != str(name)):
            return f"`{name}` holds {', '.join(f'`{key}`' for key in inside)}: write what is in it as the columns of the row"
    return None


def _is_aside(key: str, name: str) -> bool:
    """Return whether a column's name is that of a note about the row; of translations the `source` is the prompt."""
    folded = folded_name(key.strip())
    if name == "prompt" and folded == "source":
        return False
    return is_identifier(key) or folded in _ASIDE or folded.endswith(_ASIDE_ENDS)


def _is_anothers(key: str, name: str) -> bool:
    """Return whether a column's name is known as that of another field."""
    folded, role = folded_name(key), "response" if name == "answer" else name
    return folded not in _ROLES.get(role, ()) and any(folded in names for names in _ROLES.values())


def _set(columns: Mapping[str, str], choices: Sequence[str] = ()) -> str:
    """Return the advice to set `dataset.columns`, in which COLUMN stands for one of some choices."""
    written = ", ".join(f"{name}: {_in_yaml(column)}" for name, column in columns.items())
    each = "COLUMN being" if len(columns) == 1 else "each COLUMN"
    return f"set `dataset.columns` to `{{{written}}}`" + (f", {each} one of {', '.join(choices)}" if choices else "")


def _in_yaml(name: str) -> str:
    """Return a column's name as it is written in YAML."""
    return name if re.fullmatch(r"[^\W\d]\S*(?: \S+)*", name) and not {*name} & {*":#,[]{}"} else json.dumps(name)


def _described(row: Row) -> str:
    """Return the row's columns that aren't null, for a message."""
    return ", ".join(f"{key}{_unknown_turns(value)}" for key, value in row.values.items() if value is not None)


def _unknown_turns(value: Any) -> str:
    """Return a note with the keys of a list of mappings that isn't recognised as turns, for a message; else nothing."""
    if value_kind(value) != "list" or not isinstance(value[0], Mapping):
        return ""
    return (
        f" (a list of mappings with {', '.join(f'`{key}`' for key in value[0]) or 'no keys'}, which aren't known turns)"
    )
