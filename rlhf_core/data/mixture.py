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


def chosen_part(draw: int, shares: Sequence[float], seed: int) -> int:
    """Return the number of the part that draw number `draw` takes a row from."""
    return int(_choices(draw // _BLOCK, tuple(shares), seed)[draw % _BLOCK])


@lru_cache(maxsize=8)
def _choices(block: int, shares: tuple[float, ...], seed: int) -> np.ndarray:
    """Return the parts of a block of draws (BLOCK,)."""
    probabilities = np.asarray(shares) / sum(shares)
    return random_generator(seed, 0, 3, block).choice(len(shares), size=_BLOCK, p=probabilities)
