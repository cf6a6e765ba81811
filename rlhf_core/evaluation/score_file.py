"""Score rows that hold completions by a reward, and write them with their scores: whole rows, in order, resumable."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rlhf_core.data.completion_rows import CompletionRow
from rlhf_core.infra.errors import ConfigError, DataError, StorageError, shortened
from rlhf_core.infra.files import read_json, replace_json, storage_errors
from rlhf_core.rewards import Rewards, rewards_changed

log = logging.getLogger(__name__)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LOG_EVERY = 15.0
"""Seconds between two lines on how many rows are scored."""
FIRST, MOST = 16, 512
"""Rows that are scored together at first and at most: their number grows while that takes less than `QUICK` seconds."""
QUICK, SLOW = 1.0, 5.0


@dataclass
class ScoreSummary:
    """What scoring a file gave."""

    rows: int = 0
    scores: list[float] = field(default_factory=list)
    pairs: int = 0
    right: float = 0.0
    """Pairs whose chosen side has the higher score; a tie counts half."""
    seconds: float = 0.0

    def add(self, row: CompletionRow, scores: Sequence[float]) -> None:
        self.rows += 1
        self.scores += scores
        if row.shape == "pair":
            self.pairs += 1
            self.right += 1.0 if scores[0] > scores[1] else 0.5 if scores[0] == scores[1] else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values: counts, mean, standard deviation, quantiles (interpolated), and seconds."""
        count = len(self.scores)
        mean = math.fsum(self.scores) / count if count else None
        found: dict[str, Any] = {"rows": self.rows, "completions": count, "mean": mean}
        if mean is not None:
            ordered = sorted(self.scores)
            found["std"] = math.sqrt(math.fsum((x - mean) ** 2 for x in ordered) / (count - 1)) if count > 1 else 0.0
            found |= {"min": ordered[0], "max": ordered[-1]}
            found["quantiles"] = {f"{q:g}": _quantile(ordered, q) for q in QUANTILES}
        if self.pairs:
            found |= {"pairs": self.pairs, "accuracy": self.right / self.pairs}
        return found | {"seconds": round(self.seconds, 3)}


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of sorted numbers, interpolated linearly between the two nearest."""
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def score_rows(
    rewards: Rewards, rows: Iterable[CompletionRow], *, together: int | None = None
) -> Iterator[list[tuple[CompletionRow, list[float]]]]:
    """Yield rows with the scores of their completions (their weighted sums), in order, a batch at a time.

    Args:
        together: rows in a batch; None begins with few and takes more while the reward is quick.

    Raises:
        PluginError: as `Rewards.score`, with the rows' numbers.
    """
    size = together or FIRST
    batch: list[CompletionRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) < size:
            continue
        began = time.monotonic()
        yield _scored(rewards, batch)
        taken = time.monotonic() - began
        batch = []
        if together is None:
            size = min(size * 2, MOST) if taken < QUICK else max(size // 2, 1) if taken > SLOW else size
    if batch:
        yield _scored(rewards, batch)


def _scored(rewards: Rewards, rows: Sequence[CompletionRow]) -> list[tuple[CompletionRow, list[float]]]:
    samples = [sample for row in rows for sample in row.samples]
    numbers = [row.index for row in rows for _ in row.samples]
    found = rewards.score(samples, rows=numbers)
    # Not from `total`, which is float32.
    totals = iter(
        [
            sum(w * s for w, s in zip(rewards.weights, each, strict=True))
            for each in zip(*found.by_name.values(), strict=True)
        ]
    )
    return [(row, [next(totals) for _ in row.samples]) for row in rows]


def with_scores(row: CompletionRow, scores: Sequence[float], column: str) -> dict[str, Any]:
    """Return a row's columns and its scores: `score`, of several completions the list `scores`, of a pair one column a side.

    Raises:
        DataError: the row has a column of that name.
    """
    if row.shape == "pair":
        added: dict[str, Any] = {f"chosen_{column}": scores[0], f"rejected_{column}": scores[1]}
    else:
        added = {column: scores[0]} if row.shape == "one" else {f"{column}s": list(scores)}
    if taken := sorted(added.keys() & row.columns.keys()):
        raise DataError(
            f"the row has a column `{taken[0]}` already, which its score would replace",
            place=row.place,
            fix="name the new column: `--score-column NAME`",
        )
    return {**row.columns, **added}


class ScoreFile:
    """The file that scored rows are appended to, with a record of the reward beside it: `out.jsonl`, `out.score.json`.

    Args:
        path: the file.
        record: what the scores depend on, as `Rewards.describe` returns it, and the column's name.
        resume: keep the rows in it, without the part of a line that a kill left.
        overwrite: remove them.

    Raises:
        ConfigError: both are asked for, or the file was begun with another reward.
        StorageError: the file exists and is neither to be continued nor replaced, or can't be written.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path, self._record = path, path.with_suffix(".score.json")
        self.check(path, resume=resume, overwrite=overwrite)
        self.written: list[bytes] = []
        """The lines that are in the file already."""
        keep = resume and path.exists() and path.stat().st_size > 0
        if keep:
            self._check_record(record)
            with storage_errors(path):
                lines = path.read_bytes().split(b"\n")
            self.written = [line for line in lines[:-1] if line]
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(self._record, dict(record))
            self._file = path.open("r+b" if keep else "wb")
            self._file.truncate(sum(len(line) + 1 for line in self.written))
            self._file.seek(0, os.SEEK_END)

    @staticmethod
    def check(path: Path, *, resume: bool, overwrite: bool) -> None:
        """Refuse a file that exists, before anything is loaded, unless it is to be continued or replaced."""
        if resume and overwrite:
            raise ConfigError(
                "a file is either continued or replaced", place="--resume and --overwrite", fix="choose one"
            )
        if path.is_dir():
            raise StorageError("is a directory, not a file", place=str(path), fix="choose another `--output`")
        if path.exists() and path.stat().st_size > 0 and not (resume or overwrite):
            fix = "`--resume` continues it, `--overwrite` replaces it"
            raise StorageError("the file exists", place=str(path), fix=fix)

    def has(self, number: int, row: CompletionRow) -> dict[str, Any] | None:
        """Return the file's row of this number, or None where it ends before.

        Raises:
            StorageError: it isn't that row with a score.
        """
        if number >= len(self.written):
            return None
        try:
            found = json.loads(self.written[number])
            same = {name: found.pop(name) for name in row.columns} == dict(row.columns)
        except (ValueError, KeyError, AttributeError, TypeError):
            same, found = False, None
        if not same or not found:
            raise StorageError(
                f"line {number + 1} isn't the row of {row.place} with a score, so the file can't be continued",
                place=str(self.path),
                got=shortened(self.written[number][:60].decode(errors="replace")),
                fix="`--overwrite` replaces it",
            )
        return found

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, each as one line."""
        text = b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)
        with storage_errors(self.path, len(text)):
            self._file.write(text)
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _check_record(self, record: Mapping[str, Any]) -> None:
        try:
            before = read_json(self._record)
            changed = rewards_changed(before["rewards"], record["rewards"])
            if before["column"] != record["column"]:
                changed.append(f"the column {before['column']} → {record['column']}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise StorageError(
                "the file can't be continued: what its rows were scored by isn't known",
                place=str(self.path),
                got=f"no valid {self._record.name} beside it",
                fix="`--overwrite` replaces it",
            ) from None
        if changed:
            raise ConfigError(
                "the reward changed since the file was begun",
                place=str(self.path),
                got="; ".join(changed),
                fix="score by the same reward, or `--overwrite` the file",
            )


def score_file(
    rewards: Rewards,
    rows: Iterable[CompletionRow],
    file: ScoreFile | None,
    *,
    column: str = "score",
    together: int | None = None,
    summary: ScoreSummary | None = None,
) -> ScoreSummary:
    """Score rows and write them into a file, if there is one, a batch at a time; rows that it has already aren't scored again.

    Args:
        summary: is filled in as rows are scored, and returned.
    """
    summary = ScoreSummary() if summary is None else summary
    rewards.prepare()
    began = told = time.monotonic()

    def new() -> Iterator[CompletionRow]:
        for number, row in enumerate(rows):
            with_scores(row, [0.0] * len(row.samples), column)  # a clash is found before it is scored
            known = None if file is None else file.has(number, row)
            if known is None:
                yield row
                continue
            values = list(known.values())
            summary.add(row, values[0] if row.shape == "several" else values)

    for batch in score_rows(rewards, new(), together=together):
        if file is not None:
            file.append(with_scores(row, scores, column) for row, scores in batch)
        for row, scores in batch:
            summary.add(row, scores)
        now = time.monotonic()
        summary.seconds = now - began
        if now - told > LOG_EVERY:
            told = now
            log.info("scored %s rows, %.3g a second", f"{summary.rows:,}", summary.rows / summary.seconds)
    summary.seconds = time.monotonic() - began
    return summary
