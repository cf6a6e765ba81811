"""Score rows that hold completions by a reward, and write them with their scores: whole rows, in order, resumable."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.completion_rows import CompletionRow
from rlhf_core.data.row_output import RowOutput, RowOutputKind
from rlhf_core.infra.errors import DataError, StorageError, shortened
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
    ties: int = 0
    seconds: float = 0.0

    def add(self, row: CompletionRow, scores: Sequence[float]) -> None:
        self.rows += 1
        self.scores += scores
        if row.shape == "pair":
            self.pairs += 1
            self.right += 1.0 if scores[0] > scores[1] else 0.5 if scores[0] == scores[1] else 0.0
            self.ties += scores[0] == scores[1]

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
            found |= {"pairs": self.pairs, "ties": self.ties, "accuracy": self.right / self.pairs}
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

    Args, Raises: as `score_rows_by_name`.
    """
    for batch in score_rows_by_name(rewards, rows, together=together):
        # Not from `Scores.total`, which is float32.
        yield [
            (
                row,
                [
                    sum(w * s for w, s in zip(rewards.weights, each, strict=True))
                    for each in zip(*by_name.values(), strict=True)
                ],
            )
            for row, by_name in batch
        ]


def score_rows_by_name(
    rewards: Rewards, rows: Iterable[CompletionRow], *, together: int | None = None
) -> Iterator[list[tuple[CompletionRow, dict[str, list[float]]]]]:
    """Yield rows with each reward's scores of their completions, in order, a batch at a time.

    Args:
        together: rows in a batch; None begins with few and takes more while the reward is quick.

    Raises:
        PluginError: as `Rewards.score`, with the rows' places.
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


def _scored(rewards: Rewards, rows: Sequence[CompletionRow]) -> list[tuple[CompletionRow, dict[str, list[float]]]]:
    samples = [sample for row in rows for sample in row.samples]
    by_name = rewards.score(samples, rows=[row.place for row in rows for _ in row.samples]).by_name
    found, start = [], 0
    for row in rows:
        end = start + len(row.samples)
        found.append((row, {name: scores[start:end] for name, scores in by_name.items()}))
        start = end
    return found


def with_scores(row: CompletionRow, scores: Sequence[float], column: str) -> dict[str, Any]:
    """Return a row's columns and its scores: `score`, of several completions a list, of a pair one column a side.

    The column's own name is the default one's plural for a list (`scores`); a name that was chosen stays as it is.

    Raises:
        DataError: the row has a column of that name.
    """
    if row.shape == "pair":
        added: dict[str, Any] = {f"chosen_{column}": scores[0], f"rejected_{column}": scores[1]}
    else:
        added = {column: scores[0]} if row.shape == "one" else {"scores" if column == "score" else column: list(scores)}
    if taken := sorted(added.keys() & row.columns.keys()):
        raise DataError(
            f"the row has a column `{taken[0]}` already, which its score would replace",
            place=row.place,
            fix="name the new column: `--score-column NAME`",
        )
    return {**row.columns, **added}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two records: the reward, and the new column's name."""
    changed = rewards_changed(before["rewards"], now["rewards"])
    if before["column"] != now["column"]:
        changed.append(f"the column {before['column']} → {now['column']}")
    return changed


SCORES = RowOutputKind(".score.json", "what its rows were scored by", "the reward", _changes)
"""Files of scored rows. Their record holds `rewards`, as `Rewards.describe` returns it, and the `column` of the scores."""


def _scores_of(row: CompletionRow, place: str, found: Mapping[str, Any] | None, column: str) -> list[float]:
    """Return the scores that a row in the file has.

    Raises:
        StorageError: it isn't this row with its scores.
    """
    scores: list[Any] = []
    if found is not None:
        values = [found[name] for name in found if name not in row.columns]
        scores = values[0] if row.shape == "several" and len(values) == 1 else values
    numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
    if numbers and len(scores) == len(row.samples) and found == with_scores(row, scores, column):
        return scores
    raise StorageError(
        f"isn't the row of {row.place} with a score, so the file can't be continued",
        place=place,
        got="no row" if found is None else shortened(json.dumps(found, ensure_ascii=False)[:60]),
        fix="restore the file as it was written, or `--overwrite` replaces it",
    )


def score_file(
    rewards: Rewards,
    rows: Iterable[CompletionRow],
    file: RowOutput | None,
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
        written = iter(()) if file is None else file.rows()
        for row in rows:
            with_scores(row, [0.0] * len(row.samples), column)  # a clash is found before it is scored
            known = next(written, None)
            if known is None:
                yield row
            else:
                summary.add(row, _scores_of(row, *known, column))

    for batch in score_rows(rewards, new(), together=together):
        if file is not None:
            file.append(*(with_scores(row, scores, column) for row, scores in batch))
        for row, scores in batch:
            summary.add(row, scores)
        now = time.monotonic()
        summary.seconds = now - began
        if now - told > LOG_EVERY:
            told = now
            log.info("scored %s rows, %.3g a second", f"{summary.rows:,}", summary.rows / summary.seconds)
            if file is not None:
                file.note()
    summary.seconds = time.monotonic() - began
    if file is not None:
        file.note(status="done")
    return summary
