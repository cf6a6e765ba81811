"""Report on reading data: files, rows kept, truncated, and dropped by reason, tokens. No row is dropped uncounted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.contracts.records import RECORDS
from rlhf_core.data.encoder import EQUAL, EncodedRow, RowOutcome
from rlhf_core.infra.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_EXAMPLES = 5
_CONTROL = "control tokens in text, encoded as text"
_PER_ENTRY = ("rows", "kept", "tokens")
_FIRST = 256
"""Kept rows of a stream after which the user is warned of a missing label or column."""
_GIVE_BOTH = {
    "desirable": "add rows with the label `desirable`",
    "undesirable": "add rows with the label `undesirable` (`rlhf train sft` trains on good responses alone)",
}


class DataReport:
    """Counts over one pass of the data. All of them are JSON values, so a stream's state and the cache hold them.

    Args:
        record: the record type.
        name: the data's name, for messages.
        files: each source's content fingerprint.
        template_sha256: hash of the chat template; None where there is none.
        quiet: whether it logs nothing, for counts of rows that are merged into another report.
    """

    def __init__(
        self, record: str, name: str, *, files: list[dict[str, Any]], template_sha256: str | None, quiet: bool = False
    ) -> None:
        self.record, self.name, self.quiet = record, name, quiet
        self.files, self.template_sha256 = files, template_sha256
        self._logged: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.rows = self.kept = 0
        self.prompt_tokens = self.response_tokens = self.loss_tokens = 0
        self.dropped: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.shapes: dict[str, dict[str, Any]] = {}
        self.labels: dict[str, int] = {}
        self.absent: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, dict[str, int]] = {}
        self.complete = False

    @property
    def truncated(self) -> int:
        """Number of rows that were truncated to `max_length`."""
        return self.notes.get("truncated", {}).get("rows", 0)

    def add(self, outcome: RowOutcome, *, strict: bool = False) -> None:
        """Count one row.

        Raises:
            DataError: with `strict`, where the row was dropped or truncated, has columns of text that aren't used, or holds
                something that the chat template doesn't render.
        """
        self.rows += 1
        self._count_read(outcome)
        if strict and (error := _strict_error(outcome)) is not None:
            raise error
        self._count_notes(outcome)
        if outcome.row is None:
            _tally(self.dropped, str(outcome.refused), outcome.place)
        else:
            self._count_kept(outcome.row, outcome.entry)

    def _count_read(self, outcome: RowOutcome) -> None:
        """Count a row by how it was read, whether or not it is kept: its entry of `data`, its shape, columns that it lacks."""
        if outcome.entry is not None:
            self._entry(outcome.entry)["rows"] += 1
        for column, fix, owner in outcome.absent:
            name = column if owner is None else f"{owner}: {column}"
            _tally(self.absent, name, outcome.place)
            self.absent[name] = {"column": column, "entry": owner, "fix": fix} | self.absent[name]
        if outcome.read_as is not None:
            if outcome.read_as not in self.shapes:
                self._log_shape(outcome.read_as)
            _tally(self.shapes, outcome.read_as, outcome.place)

    def _count_notes(self, outcome: RowOutcome) -> None:
        """Count a row under each warning on it."""
        if outcome.unused:
            _tally(self.notes, f"columns that aren't used: {_named(outcome.unused)}", outcome.place)
        if outcome.truncated:
            _tally(self.notes, "truncated", outcome.place)
        for note in (*outcome.set_aside, *outcome.lost, *outcome.notes):
            _tally(self.notes, note, outcome.place)
        if outcome.control_text:
            _tally(self.notes, _CONTROL, outcome.place)
            seen = self.notes[_CONTROL].setdefault("tokens", [])
            seen += [token for token in outcome.control_text if token not in seen][: _EXAMPLES - len(seen)]
        for column in outcome.left_out:
            _tally(self.notes, f"column `{column}` is not a JSON value and is left out", outcome.place)

    def _count_kept(self, row: EncodedRow, entry: str | None) -> None:
        """Count a row that is used, its tokens and its labels."""
        self.kept += 1
        if entry is not None:
            counts = self._entry(entry)
            counts.setdefault("first", row.index)
            counts["kept"] += 1
            counts["tokens"] += row.num_tokens
        self.prompt_tokens += len(row.prompt_ids)
        self.response_tokens += sum(map(len, row.responses))
        self.loss_tokens += sum(map(sum, row.masks))
        for desirable in row.per_response.get("desirable", ()):
            label = "desirable" if desirable else "undesirable"
            self.labels[label] = self.labels.get(label, 0) + 1

    def _entry(self, name: str) -> dict[str, int]:
        """Return the counts of an entry of `data`: of its rows, those that are kept and their tokens, and its first kept row."""
        return self.entries.setdefault(name, dict.fromkeys(_PER_ENTRY, 0))

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the counts of the rows that follow, of which another report has the `state_dict`."""
        for name, value in state.items():
            mine = getattr(self, name)
            if name == "complete":
                continue
            if not isinstance(value, dict):
                setattr(self, name, mine + value)
            elif name == "entries":
                for key, counts in value.items():
                    entry = self._entry(key)
                    for count in _PER_ENTRY:
                        entry[count] += counts[count]
                    if "first" in counts:
                        entry.setdefault("first", counts["first"])
            elif name == "labels":
                self.labels = {key: mine.get(key, 0) + value.get(key, 0) for key in {**mine, **value}}
            else:
                for key, tally in value.items():
                    if key not in mine and name == "shapes":
                        self._log_shape(key)
                    mine[key] = _joined(mine[key], tally) if key in mine else _copied(tally)

    def finish(self) -> None:
        """End the pass: warn of dropped and truncated rows, once.

        Raises:
            ConfigError: no row has a column that `dataset.columns` names.
            DataError: no row is kept, or rows of `unpaired` have one label only.
        """
        if self.complete:
            return
        self.check()
        self.complete = True
        self._log_warnings()

    def check(self) -> None:
        """Raise what `finish` does."""
        for tally in self._absent_columns():
            owner = tally["entry"]
            place = (
                f"dataset.columns, for {self.name}" if owner is None else f"`columns` of the entry `{owner}` of data"
            )
            fix = tally["fix"] if owner is None else tally["fix"].replace("dataset.columns", "columns")
            raise ConfigError(f"no row has a column `{tally['column']}`", place=place, fix=fix)
        if not self.kept:
            got = ", ".join(f"{tally['rows']} × {reason}" for reason, tally in self.dropped.items())
            raise DataError(
                f"none of {self.rows} rows can be used",
                place=self.name,
                got=got,
                fix=self._fix_for_no_rows(),
            )
        if (missing := self._missing_label()) is not None:
            raise DataError(
                f"no row has the label `{missing}`; unpaired data need both",
                place=self.name,
                got=f"{self.kept} rows, all `{next(iter(self.labels))}`",
                fix=_GIVE_BOTH[missing],
            )

    def repeat_log(self) -> None:
        """Log again what was logged when these rows were read, where the counts were loaded from the cache."""
        for shape in self.shapes:
            self._log_shape(shape)
        self._log_warnings()

    def _log_shape(self, shape: str) -> None:
        self._log(logging.INFO, f"{self.name}: rows read as {shape}")

    def _log_warnings(self) -> None:
        for line in self.warnings():
            self._log(logging.WARNING, line)

    def _log(self, level: int, line: str) -> None:
        """Log a line, once, however often the rows are read. Every process reads all rows, so the first one shows it for all."""
        if line not in self._logged and not self.quiet:
            self._logged.add(line)
            logger.log(level, "%s", line, extra={"same_everywhere": True})

    def warn_of_first_rows(self) -> None:
        """Warn, after the first 256 kept rows of a stream, of a label or a column of `dataset.columns` that none of them has.

        Only the end of the stream, which may never come, would show that it is missing. Call this after each row that is kept.
        """
        for tally in self._absent_columns() if self.kept == _FIRST else ():
            logger.warning(
                "%s: none of the first %d rows has a column `%s`: %s",
                self.name, tally["rows"], tally["column"], tally["fix"],
            )  # fmt: skip
        if self.kept == _FIRST and (missing := self._missing_label()) is not None:
            logger.warning(
                "%s: none of the first %d rows has the label `%s`, and unpaired data need both labels: %s, mixed with the others",
                self.name, self.kept, missing, _GIVE_BOTH[missing],
            )  # fmt: skip

    def _absent_columns(self) -> list[dict[str, Any]]:
        """Return the tallies of columns that were named, and that none of the rows that they are for has so far."""
        rows = {name: entry["rows"] for name, entry in self.entries.items()}
        return [tally for tally in self.absent.values() if tally["rows"] == rows.get(tally["entry"], self.rows)]

    def _missing_label(self) -> str | None:
        """Return the label that no row of `unpaired` has so far; None where both occur or the record type has none."""
        if "label" not in RECORDS[self.record].required or len(self.labels) > 1:
            return None
        return "undesirable" if "desirable" in self.labels else "desirable"

    def _fix_for_no_rows(self) -> str:
        if EQUAL in self.dropped:
            return "give pairs whose answers differ; a larger `max_length` keeps what tells them apart"
        return "raise `max_length`, or set another `dataset.truncation`"

    def warnings(self) -> list[str]:
        """Return the warnings: one line per reason for which rows were dropped, and per other note, with the number of rows."""
        lines = [
            f"{self.name}: dropped {tally['rows']} of {self.rows} rows: {reason} ({_examples(tally)})"
            for reason, tally in self.dropped.items()
        ]
        lines += [
            f"{self.name}: {tally['rows']} of {self.rows} rows: {note} ({_examples(tally)}){_tokens(tally)}"
            for note, tally in self.notes.items()
        ]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report as JSON values, for the run's `data.json`."""
        return {
            "record": self.record,
            "name": self.name,
            "files": self.files,
            "template_sha256": self.template_sha256,
            "truncated": self.truncated,
            **self.state_dict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, as JSON values."""
        names = (
            "rows",
            "kept",
            "dropped",
            "notes",
            "shapes",
            "labels",
            "absent",
            "entries",
            "prompt_tokens",
            "response_tokens",
            "loss_tokens",
        )
        state = {name: getattr(self, name) for name in (*names, "complete")}
        return {name: _copied(value) for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts of a `state_dict`."""
        for name in self.state_dict():
            setattr(self, name, _copied(state[name]))


def _strict_error(outcome: RowOutcome) -> DataError | None:
    """Return the error that a row is under `dataset.strict`, for what is else dropped or warned of; None where nothing is."""
    got = None
    if outcome.refused or outcome.truncated:
        problem = outcome.refused or "longer than max_length, and would be truncated"
        fix = "repair the row, raise `max_length`"
    elif outcome.unused:
        problem, got = "has columns that aren't used", _named(outcome.unused)
        fix = "use it (`dataset.columns`), list it in `dataset.ignore_columns`"
    elif outcome.lost:
        problem, fix = outcome.lost[0], "set `dataset.chat_template` to a template that does"
    elif outcome.set_aside:
        problem, fix = outcome.set_aside[0], "repair the row"
    else:
        return None
    return DataError(problem, place=outcome.place, got=got, fix=f"{fix}, or unset `dataset.strict`")


def _tally(tallies: dict[str, dict[str, Any]], name: str, place: str) -> None:
    """Count a row under `name`, and keep the places of the first five as examples."""
    tally = tallies.setdefault(name, {"rows": 0, "examples": []})
    tally["rows"] += 1
    if len(tally["examples"]) < _EXAMPLES:
        tally["examples"].append(place)


def _joined(tally: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tally of some rows and those that follow: counts added, of places and other lists the first five."""
    joined = {**other, **tally}
    for name in {*tally} & {*other}:
        if isinstance(tally[name], int):
            joined[name] = tally[name] + other[name]
        elif isinstance(tally[name], list):
            known = tally[name] if name == "tokens" else []  # each is listed once, but a place as often as it is met
            joined[name] = [*tally[name], *(one for one in other[name] if one not in known)][:_EXAMPLES]
    return joined


def _named(columns: Sequence[str]) -> str:
    return ", ".join(f"`{column}`" for column in columns)


def _examples(tally: Mapping[str, Any]) -> str:
    more = ["…"] if tally["rows"] > len(tally["examples"]) else []
    return ", ".join([*tally["examples"], *more])


def _tokens(tally: Mapping[str, Any]) -> str:
    if not tally.get("tokens"):
        return ""
    names = ", ".join(f"`{token}`" for token in tally["tokens"])
    return f": {names}; `dataset.special_tokens` lists those that data may use"


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value
