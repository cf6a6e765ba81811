"""Rows that hold completions, with the flaws that were found in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.data.completion_rows import CompletionRow
from rlhf_core.improvement.adversarial_validator import CompletionFlaws
from rlhf_core.infra.errors import DataError

FLAWS, QUALITY = "flaws", "quality"


def with_flaws(rows: Sequence[CompletionRow], found: Sequence[CompletionFlaws]) -> Iterator[dict[str, Any]]:
    """Yield each row's columns with `flaws` (the names of those that are flagged) and `quality` of its completion.

    Of several completions each is a list with one entry per completion; of a pair the names begin with `chosen_` and `rejected_`.

    Args:
        found: of each completion of each row, in their order.

    Raises:
        DataError: a row has a column of that name.
    """
    start = 0
    for row in rows:
        own = found[start : start + len(row.samples)]
        start += len(row.samples)
        flaws, quality = [list(one.flagged) for one in own], [one.quality for one in own]
        added: dict[str, Any]
        if row.shape == "pair":
            sides = ("chosen", "rejected")
            added = {f"{side}_{FLAWS}": one for side, one in zip(sides, flaws, strict=True)}
            added |= {f"{side}_{QUALITY}": one for side, one in zip(sides, quality, strict=True)}
        elif row.shape == "one":
            added = {FLAWS: flaws[0], QUALITY: quality[0]}
        else:
            added = {FLAWS: flaws, QUALITY: quality}
        if taken := sorted(added.keys() & row.columns.keys()):
            problem = f"the row has a column `{taken[0]}` already, which its flaws would replace"
            raise DataError(problem, place=row.place, fix="rename that column")
        yield {**row.columns, **added}


def flaws_of(row: Mapping[str, Any]) -> list[list[str]]:
    """Return the flaws of each completion of a row that `with_flaws` made of one completion, or of several."""
    return list(row[FLAWS]) if isinstance(row.get("completions"), list) else [list(row[FLAWS])]
