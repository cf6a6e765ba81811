"""The one place that meets running out of memory: try, and where it doesn't fit, try smaller."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from rlhf_core.infra.devices import is_out_of_memory, release_memory
from rlhf_core.infra.errors import NumbersError

log = logging.getLogger(__name__)

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Fitted(Generic[Result]):
    """What an attempt returned that found the memory it needed."""

    def __init__(self, value: Result) -> None:
        self.value = value


def attempt(work: Callable[[], Result], device: torch.device) -> Fitted[Result] | None:
    """Return what `work` returned; None where memory ran out, all that it held given back."""
    try:
        return Fitted(work())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the error's traceback keeps the frames of the failed attempt, and their tensors, alive.
    release_memory(device)
    return None


def in_parts(
    piece: Piece,
    work: Callable[[Piece], Result],
    halve: Callable[[Piece], Sequence[Piece]],
    *,
    device: torch.device,
    unit: str = "row",
) -> list[Result]:
    """Return the result of `work` on a piece, or of its halves where memory runs out, and of theirs, in order.

    Args:
        halve: cuts a piece into smaller ones; fewer than two where it can't be cut.
        device: the device whose memory it is.
        unit: what the smallest piece is, for the message.

    Raises:
        NumbersError: memory ran out on a piece that can't be cut.
    """
    if (found := attempt(lambda: work(piece), device)) is not None:
        return [found.value]
    parts = halve(piece)
    if len(parts) < 2:
        raise NumbersError(
            f"out of memory with one {unit} at a time",
            fix="set a smaller `max_length` (`generation.max_new_tokens` for completions), or `precision: bf16`",
        )
    log.warning("out of memory: trying again in halves")
    return [result for part in parts for result in in_parts(part, work, halve, device=device, unit=unit)]
