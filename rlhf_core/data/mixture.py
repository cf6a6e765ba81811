"""Mixtures: rows drawn from several parts of the data by probability, as a function of seed and number of the draw alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from rlhf_core.data.encoder import RowOutcome
from rlhf_core.infra.errors import DataError
from rlhf_core.infra.seeds import random_generator

Position = list[Any]
"""Position of a walk within an epoch, as JSON values; empty at the beginning."""

Part = Callable[[int, Position], Iterator[tuple[RowOutcome, Position]]]
"""Gives one part's rows from a position in one of its own epochs on, each with the position after it."""

_BLOCK = 4096
"""Draws that are made together."""


def mixture(
    parts: Mapping[str, Part], shares: Sequence[float], *, seed: int, position: Position, end: int | None
) -> Iterator[tuple[RowOutcome, Position]]:
    """Yield rows, each of a part drawn with the probability that is its share, with the position after each.

    A part is read in its own order and, when it ends, again from its beginning, in another order. So each of its rows comes once
    before any comes twice. Outcomes of refused rows are yielded too and take no draw.

    Args:
        parts: by name, for messages.
        shares: one per part, with the sum 1.
        position: draws so far, and for each part the number of its epoch and the position in that.
        end: draws after which it ends; None never ends.

    Raises:
        DataError: an epoch of a part has no row that can be used.
    """
    start: Position = position or [0, [[0, []] for _ in parts]]
    drawn, at = start
    places: list[tuple[int, Position]] = [(epoch, inside) for epoch, inside in at]
    names, opened = list(parts), list(parts.values())
    walks = [part(*place) for part, place in zip(opened, places, strict=True)]
    empty = [not inside for _, inside in places]
    while end is None or drawn < end:
        number = chosen_part(drawn, shares, seed)
        while True:
            epoch, _ = places[number]
            found = next(walks[number], None)
            if found is None:
                if empty[number]:
                    raise DataError("has no row that can be used, and so no share", place=names[number])
                places[number], empty[number] = (epoch + 1, []), True
                walks[number] = opened[number](*places[number])
                continue
            outcome, inside = found
            places[number] = (epoch, inside)
            kept = outcome.row is not None
            empty[number] = empty[number] and not kept
            drawn += kept
            yield replace(outcome, again=epoch > 0), [drawn, [list(place) for place in places]]
            if kept:
                break


def mixture_text(
    names: Sequence[str], rows: Sequence[float | None], groups: Sequence[tuple[float, Sequence[int]]]
) -> str | None:
    """Return what share of a step's rows each entry of the data has on average, as text; None where that isn't known.

    Args:
        names: of the entries.
        rows: of an epoch that each entry has alone, weights counted in; None where it isn't known.
        groups: the share of each group of entries from which rows are drawn, and their numbers; none where all are read one after
            the other.
    """
    known = [count for count in rows if count is not None]
    total = sum(known) if len(known) == len(rows) else None
    said = []
    for share, numbers in groups or [(1.0, range(len(names)))]:
        counts = [rows[number] for number in numbers]
        together = sum(count for count in counts if count is not None)
        if (None in counts and len(counts) > 1) or (not together and None not in counts):
            if not groups:
                return None
            said.append(f"{' and '.join(names[number] for number in numbers)} together {100 * share:.3g} %")
            continue
        for number, count in zip(numbers, counts, strict=True):
            part = share if count is None else share * count / together
            text = f"{names[number]} {100 * part:.3g} %"
            if count and total is not None:
                times = f", each {part * total / count:.2g} times in an epoch" if groups else ""
                text += f" ({count:,.0f} rows{times})"
            said.append(text)
    return "; ".join(said)


def chosen_part(draw: int, shares: Sequence[float], seed: int) -> int:
    """Return the number of the part that draw number `draw` takes a row from."""
    return int(_choices(draw // _BLOCK, tuple(shares), seed)[draw % _BLOCK])


@lru_cache(maxsize=8)
def _choices(block: int, shares: tuple[float, ...], seed: int) -> np.ndarray:
    """Return the parts of a block of draws (BLOCK,)."""
    probabilities = np.asarray(shares) / sum(shares)
    return random_generator(seed, 0, 3, block).choice(len(shares), size=_BLOCK, p=probabilities)
