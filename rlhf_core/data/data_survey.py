"""What some data hold: every mistake, lengths, duplicates, labels, and rows as the model sees them, before any training.

Reading for a run ends at the first mistake; a survey passes over rows with a mistake and notes each.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_core.config.training import DEFAULT_MAX_LENGTH, DatasetConfig
from rlhf_core.contracts.records import RECORDS, Message
from rlhf_core.data.data_report import DataReport
from rlhf_core.data.data_source import DataSource, SourcePart
from rlhf_core.data.encoder import EQUAL, EncodedRow, Encoder, RowOutcome
from rlhf_core.data.missing_columns import hint_of_row
from rlhf_core.data.open_source import open_source
from rlhf_core.data.row_checker import CheckedRow, RowChecker, fitting_record
from rlhf_core.data.row_source import Row, RowEntry, RowSource
from rlhf_core.infra.errors import DataError, RLHFError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256
_FIRST = 20
"""Rows from whose columns the record type is recognised."""
_ANSWERED = 4
"""Of so many rows one with a response shows that the others are to have one, too."""
_FEW = 3
"""Mistakes that are alike of which each is shown."""
_KEPT = 1000
"""Mistakes that are kept; more are counted."""


class Lengths:
    """Lengths of rows, in one unit.

    Args:
        unit: what is counted, in the plural: tokens or characters.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.values = array("q")

    def __len__(self) -> int:
        return len(self.values)

    def share_above(self, most: int) -> float:
        """Return the share of rows that are longer than `most`."""
        return sum(value > most for value in self.values) / len(self.values) if self.values else 0.0

    def at_most(self, share: float) -> int:
        """Return the least length that at most this share of the rows is above; 0 cuts none."""
        ordered = sorted(self.values)
        return ordered[len(ordered) - 1 - int(share * len(ordered))] if ordered else 0

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """Return (least, most, rows) of up to so many intervals of equal width.

        Where a few rows are far longer than all others, the last interval is wider and holds those.
        """
        if not self.values:
            return []
        low, longest, usual = min(self.values), max(self.values), self.at_most(0.01)
        high = usual if longest - low > 1.5 * (usual - low) else longest
        width = max(1, -(-(high - low + 1) // (bins if high == longest else bins - 1)))
        counts = Counter(min(value - low, high - low) // width if value <= high else -1 for value in self.values)
        last = (high - low) // width
        found = [(low + n * width, min(high, low + (n + 1) * width - 1), counts[n]) for n in range(last + 1)]
        return found if high == longest else [*found, (high + 1, longest, counts[-1])]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        if not self.values:
            return {"unit": self.unit}
        return {
            "unit": self.unit,
            "least": min(self.values),
            "median": self.at_most(0.5),
            "mean": sum(self.values) / len(self.values),
            "most": max(self.values),
            "cutting_1_percent": self.at_most(0.01),
            "cutting_none": self.at_most(0.0),
            "histogram": self.histogram(),
        }


class NotedMistakes:
    """Mistakes by kind, in the order in which they were met: all are counted, the first thousand are kept.

    Mistakes of one kind have the same problem, whatever their place.

    Args:
        errors: mistakes that are known already; what is in the `also` of one is among them.
    """

    def __len__(self) -> int:
        return self.kinds.total()

    def __init__(self, errors: Iterable[RLHFError] = ()) -> None:
        self.kept: list[RLHFError] = []
        self.kinds: Counter[str] = Counter()
        for error in errors:
            self._add(error)

    def add(self, error: RLHFError) -> None:
        """Count a mistake with those in its `also`."""
        for one in (error, *error.also):
            self._add(one)

    def _add(self, error: RLHFError) -> None:
        self.kinds[error.problem] += 1
        if len(self.kept) < _KEPT:
            self.kept.append(error)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Count an `RLHFError` of the block instead of raising it."""
        try:
            yield
        except RLHFError as error:
            self.add(error)

    def add_all(self, others: NotedMistakes) -> None:
        """Count all of other mistakes."""
        self.kinds += others.kinds
        self.kept += others.kept[: _KEPT - len(self.kept)]

    def of_rows(self, rows: int) -> NotedMistakes:
        """Return these mistakes of one file; where each of its rows has the same one, as a lacking column, that alone.

        Args:
            rows: how many rows of the file were read.
        """
        texts = {(error.problem, error.fix) for error in self.kept}
        if rows <= _FEW or len(self) != rows or len(self.kinds) != 1 or len(texts) != 1:
            return self
        first = self.kept[0]
        problem = f"{first.problem} (the same in all {rows:,} rows that were read)"
        return NotedMistakes([type(first)(problem, place=first.place, got=first.got, fix=first.fix)])

    def shown(self, most: int) -> tuple[list[RLHFError], dict[str, int]]:
        """Return mistakes in the order in which they were met, and kind → how many more there are.

        Of more than `most`, about that many are returned, some of each kind; of those that differ in their places alone, a few.
        """
        if len(self) <= most:
            return list(self.kept), {}
        each, of_kind, shown = max(1, most // len(self.kinds)), Counter[str](), []
        alike: Counter[tuple[str, str | None]] = Counter()
        for error in self.kept:
            if of_kind[error.problem] < each and alike[error.problem, error.fix] < _FEW:
                of_kind[error.problem] += 1
                alike[error.problem, error.fix] += 1
                shown.append(error)
        more = {kind: count - of_kind[kind] for kind, count in self.kinds.items() if count > of_kind[kind]}
        return shown, more


class MarkedText(NamedTuple):
    """A piece of an encoded row as text."""

    text: str
    in_loss: bool
    """Whether its tokens are in the loss."""


@dataclass(frozen=True)
class RowPicture:
    """One row as the model sees it: its parts by name (prompt, response, chosen …) in pieces of tokens in the loss and not."""

    place: str
    parts: dict[str, list[MarkedText]]
    tokens: int
    truncated: bool

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        parts = {name: [piece._asdict() for piece in pieces] for name, pieces in self.parts.items()}
        return {"place": self.place, "tokens": self.tokens, "truncated": self.truncated, "parts": parts}


@dataclass
class DataSurvey:
    """What some data hold."""

    record: str
    """Record type that the rows were read as."""
    recognised: bool
    """Whether the record type was recognised from the columns, rather than given."""
    files: list[str]
    report: DataReport
    """Counts of rows by shape, note, reason for being refused, and label."""
    lengths: Lengths
    """Of each prompt with its longest response: tokens before truncation; characters without a tokenizer."""
    prompts: Lengths
    """Of the prompts alone, in characters."""
    max_length: int
    mistakes: NotedMistakes = field(default_factory=NotedMistakes)
    rows: int = 0
    """Rows that were read, those with a mistake included."""
    whole: bool = True
    """Whether all rows were read; False where `limit` ended that."""
    epoch_rows: float | None = None
    """Rows of an epoch that can be trained on, weights counted in; estimated where not all were read, None where it can't be."""
    entry_rows: list[float | None] = field(default_factory=list)
    """The same of each entry of the data alone."""
    duplicates: int = 0
    """Rows whose prompt and responses are those of an earlier row."""
    duplicate_places: list[tuple[str, str]] = field(default_factory=list)
    """Places of the first duplicates, each with that of the earlier row."""
    repeated_prompts: int = 0
    """Rows with the prompt of an earlier row, and other responses."""
    words: int = 0
    """Words of all prompts and responses."""
    plain: bool = False
    """Whether rows are plain text, the model has a chat template, and `dataset.wrap` doesn't say whether to use it."""
    pictures: list[RowPicture] = field(default_factory=list)

    @property
    def cut(self) -> float:
        """Share of the rows that are longer than `max_length`; only of lengths in tokens."""
        return self.lengths.share_above(self.max_length)

    def as_dict(self, most: int = _KEPT) -> dict[str, Any]:
        """Return JSON values, with at most so many mistakes."""
        tokens = self.lengths.unit == "tokens"
        return {
            "record": self.record,
            "record_recognised": self.recognised,
            "files": self.files,
            "rows": self.rows,
            "whole": self.whole,
            "usable_rows": self.report.kept,
            "epoch_rows": self.epoch_rows,
            "read_as": {shape: tally["rows"] for shape, tally in self.report.shapes.items()},
            "labels": dict(self.report.labels),
            "duplicates": self.duplicates,
            "repeated_prompts": self.repeated_prompts,
            "lengths": self.lengths.as_dict(),
            "max_length": self.max_length if tokens else None,
            "share_cut": self.cut if tokens else None,
            "refused": {reason: tally["rows"] for reason, tally in self.report.dropped.items()},
            "notes": {note: tally["rows"] for note, tally in self.report.notes.items()},
            "plain_text_beside_a_chat_template": self.plain,
            "mistakes": len(self.mistakes),
            "errors": [error.line() for error in self.mistakes.shown(most)[0]],
            "examples": [picture.as_dict() for picture in self.pictures],
        }


def survey_data(
    data: Any,
    record: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: DatasetConfig | None = None,
    max_length: int = DEFAULT_MAX_LENGTH,
    limit: int | None = None,
    pictures: int = 2,
) -> DataSurvey:
    """Read data and return what they hold; a row's mistake is noted, and reading goes on.

    Args:
        data: as `open_source` takes it.
        record: the record type; None recognises it from the columns of the first rows.
        tokenizer: encodes the rows; without one they are checked, and lengths are in characters.
        options: how rows are read; the defaults where None.
        max_length: most tokens in a prompt with its longest response.
        limit: most rows to read of each file or table; None reads all.
        pictures: how many rows to show as they are encoded.

    Raises:
        DataError: nothing of that name exists, or it isn't data.
        ConfigError: an option doesn't fit the record type.
        ModelError: the tokenizer isn't a fast one.
    """
    options = options or DatasetConfig()
    source = open_source(data, split=options.split, streaming=options.streaming)
    chosen = record or recognised_record(source, options)
    return _Surveyor(source, chosen, tokenizer, options, max_length, pictures).survey(limit, recognised=record is None)


def recognised_record(source: DataSource, options: DatasetConfig) -> str:
    """Return the record type that the columns of the first rows fit.

    Raises:
        DataError: they fit none, or no row can be read: then with the mistakes of the rows, the first ones in its `also`.
    """
    found: Counter[str] = Counter()
    first: Row | None = None
    unread = NotedMistakes()
    for one, entry in ((one, part.entry) for part in source.parts for one in part.sources):
        named = {**options.columns, **dict(entry.columns if entry is not None else ())}
        before = len(unread)
        one.refused = unread.add  # where a row can be read, the survey notes them when it reads all rows
        try:
            for row in itertools.islice(DataSource([SourcePart([one])]).rows(), _FIRST):
                first = first or row
                if fits := fitting_record(row, RECORDS, named):
                    found[fits] += 1
        except DataError as error:
            if error.problem != "holds no rows" or len(unread) == before:
                unread.add(error)
        finally:
            one.refused = None
    if first is None and unread:
        raise _together(unread, source.name)
    if found:
        # A row that lacks its response fits `prompt`: where many have one, that is a mistake of the others.
        answered = Counter({name: count for name, count in found.items() if RECORDS[name].responses})
        several = answered.total() * _ANSWERED >= found.total()
        return (answered if several else found).most_common(1)[0][0]
    columns = ", ".join(map(str, first.values)) if first is not None else ""
    seen = None if first is None else hint_of_row(first)
    raise DataError(
        "the columns fit no record type",
        place=source.name if first is None else first.place,
        got=f"columns {columns}" if columns else "no columns",
        fix=seen or "give `--method`, for what its rows need, or name the columns: `--dataset.columns.prompt COLUMN`",
    )


def _together(mistakes: NotedMistakes, name: str) -> RLHFError:
    """Return the first of some mistakes, with the next ones in its `also`, and how many more there are."""
    first, *others = mistakes.kept[:_FIRST]
    more = len(mistakes) - 1 - len(others)
    first.also = (*others, *([DataError(f"{more:,} more rows can't be read", place=name)] if more else []))
    return first


class _Surveyor:
    """Reads the rows of one survey."""

    def __init__(
        self,
        source: DataSource,
        record: str,
        tokenizer: PreTrainedTokenizerBase | None,
        options: DatasetConfig,
        max_length: int,
        pictures: int,
    ) -> None:
        self.source, self.options, self.wanted = source, options, pictures
        self.checker = RowChecker(record, options.columns, format=options.format, ignored=options.ignore_columns)
        self.encoder = None if tokenizer is None else Encoder.with_options(tokenizer, record, options, max_length)
        self.report = DataReport(record, source.name, files=[], template_sha256=None)
        self.found = DataSurvey(
            record, False, [one.name for one in source.sources], self.report,
            Lengths("characters" if tokenizer is None else "tokens"), Lengths("characters"), max_length,
        )  # fmt: skip
        self.seen: dict[bytes, str] = {}
        self.seen_prompts: set[bytes] = set()

    def survey(self, limit: int | None, *, recognised: bool) -> DataSurvey:
        """Read the rows of every file or table, at most `limit` of each."""
        found = self.found
        found.recognised = recognised
        for part in self.source.parts:
            rows: float | None = 0.0
            for one in part.sources:
                kept = self.report.kept
                times = self._read(one, part.entry, limit)
                more = None if times is None else part.weight * times * (self.report.kept - kept)
                rows = None if rows is None or more is None else rows + more
            found.entry_rows.append(rows if part.rows is None else float(part.rows))
        known = [rows for rows in found.entry_rows if rows is not None]
        found.epoch_rows = sum(known) if len(known) == len(found.entry_rows) else None
        if found.whole and self.report.rows:
            try:
                self.report.check()
            except RLHFError as error:
                found.mistakes.add(error)
        found.plain = self.encoder is not None and self.encoder.plain
        return found

    def _read(self, one: RowSource, entry: RowEntry | None, limit: int | None) -> float | None:
        """Read the rows of one file or table; return how many times as many it has as were read, None where that isn't known."""
        found, of_others = self.found, self.found.mistakes
        found.mistakes = NotedMistakes()
        one.refused = self._refuse
        first, last = found.rows, None
        rows: Iterator[Row] = DataSource([SourcePart([one], entry=entry)]).rows()
        sound: list[Row] = []
        times: float | None = 1.0
        try:
            for row in rows:
                if limit is not None and found.rows - first >= limit:
                    found.whole, times = False, None if last is None else _whole_over_read(one, last)
                    break
                last = row
                found.rows += 1
                if self._is_sound(row):
                    sound.append(row)
                if len(sound) == _CHUNK:
                    self._encode(sound)
                    sound = []
        except RLHFError as error:
            # Of a file whose every row is refused that is said already.
            if error.problem != "holds no rows" or not found.mistakes:
                found.mistakes.add(error)
        finally:
            one.refused = None
        self._encode(sound)
        of_others.add_all(found.mistakes.of_rows(found.rows - first))
        found.mistakes = of_others
        return times

    def _refuse(self, error: DataError) -> None:
        self.found.rows += 1
        self.found.mistakes.add(error)

    def _is_sound(self, row: Row) -> bool:
        """Check a row and measure it; note its mistake and return False where it has one."""
        try:
            checked = self.checker.check(row)
        except DataError as error:
            self.found.mistakes.add(error)
            return False
        self._measure(checked)
        if self.encoder is None:
            self._count(_outcome_of(checked))
        return True

    def _encode(self, rows: Sequence[Row]) -> None:
        """Encode checked rows, where there is a tokenizer, and count them."""
        for outcome in self._encoded(rows) if self.encoder is not None else ():
            self.found.lengths.values.append(outcome.tokens)
            if self._count(outcome):
                self._picture(outcome)

    def _encoded(self, rows: Sequence[Row]) -> Iterator[RowOutcome]:
        """Yield the outcomes of rows; the mistake of one is noted, and the others are encoded."""
        assert self.encoder is not None
        try:
            outcomes = self.encoder.encode(rows)
        except DataError as error:
            if len(rows) == 1:
                self.found.mistakes.add(error)
                return
            for row in rows:
                yield from self._encoded([row])
            return
        yield from outcomes

    def _count(self, outcome: RowOutcome) -> bool:
        """Count a row in the report; return whether `dataset.strict` accepts it."""
        try:
            self.report.add(outcome, strict=self.options.strict)
        except DataError as error:
            self.found.mistakes.add(error)
            return False
        return True

    def _measure(self, checked: CheckedRow) -> None:
        """Count a row's characters and words, and notice whether it was there before."""
        found = self.found
        prompt, responses = _text_of(checked.prompt), [_text_of(response) for response in checked.responses]
        found.prompts.values.append(len(prompt))
        found.words += sum(len(text.split()) for text in (prompt, *responses))
        if self.encoder is None:
            found.lengths.values.append(len(prompt) + max(map(len, responses), default=0))
        of_prompt = _digest(checked.prompt, checked.tools)
        whole = _digest(of_prompt.hex(), checked.responses, {**checked.per_response})
        if whole in self.seen:
            found.duplicates += 1
            if len(found.duplicate_places) < 3:
                found.duplicate_places.append((checked.place, self.seen[whole]))
        else:
            self.seen[whole] = checked.place
            found.repeated_prompts += bool(prompt) and of_prompt in self.seen_prompts
        self.seen_prompts.add(of_prompt)

    def _picture(self, outcome: RowOutcome) -> None:
        """Keep the first rows as pictures, the last of them a truncated one where there is any."""
        pictures, row = self.found.pictures, outcome.row
        if row is None or self.encoder is None or not self.wanted:
            return
        if len(pictures) < self.wanted:
            pictures.append(row_picture(row, outcome, self.encoder))
        elif outcome.truncated and not any(one.truncated for one in pictures):
            pictures[-1] = row_picture(row, outcome, self.encoder)


def row_picture(row: EncodedRow, outcome: RowOutcome, encoder: Encoder) -> RowPicture:
    """Return an encoded row as text, with what is in the loss."""
    names = RECORDS[encoder.record].responses
    parts = {"prompt": [MarkedText(encoder.tokenizer.decode(row.prompt_ids), False)]}
    for name, ids, mask in zip(names, row.responses, row.masks, strict=True):
        pieces, start = [], 0
        for in_loss, group in itertools.groupby(mask):
            end = start + len(list(group))
            pieces.append(MarkedText(encoder.tokenizer.decode(ids[start:end]), in_loss))
            start = end
        parts[name] = pieces
    return RowPicture(outcome.place, parts, outcome.tokens, outcome.truncated)


def _outcome_of(checked: CheckedRow) -> RowOutcome:
    """Return what the report counts of a row that is only checked."""
    same = len(checked.responses) == 2 and checked.responses[0] == checked.responses[1]
    row = None if same else EncodedRow(checked.index, [], per_response=dict(checked.per_response))
    return RowOutcome(
        checked.place, row, EQUAL if same else None, left_out=checked.left_out, read_as=checked.read_as, unused=checked.unused,
        set_aside=checked.set_aside, absent=checked.absent,
    )  # fmt: skip


def _text_of(part: str | list[Message]) -> str:
    """Return a prompt or a response as text: of messages their contents."""
    return part if isinstance(part, str) else "\n".join(str(message.get("content") or "") for message in part)


def _digest(*values: Any) -> bytes:
    written = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.blake2b(written.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _whole_over_read(source: RowSource, last: Row) -> float | None:
    """Return how many times as many rows a source has as were read up to a row; None where that isn't known."""
    table = getattr(source, "table", None)
    if table is not None:
        return float(len(table)) / last.after.line
    offset = last.after.offset
    size = source.size
    plain = str(getattr(source, "path", "")).endswith((".jsonl", ".ndjson", ".csv", ".tsv"))
    return size / offset if plain and offset and size < sys.maxsize else None
