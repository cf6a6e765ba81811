"""What is done when memory runs out: release what the failed attempt held, and try on halves. Nothing else does it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from rlhf_core.infra.devices import is_out_of_memory, release_memory
from rlhf_core.infra.errors import NumbersError

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class Fits(Generic[Result]):
    """What a call returned that didn't run out of memory: `value` may itself be None."""

    def __init__(self, value: Result) -> None:
        self.value = value


def try_to_fit(work: Callable[[], Result], device: torch.device) -> Fits[Result] | None:
    """Call `work`; return its value as `Fits`, or None where memory ran out, once all that the call held is released."""
    try:
        return Fits(work())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the error's traceback keeps the frames of the failed call, and their tensors, alive.
    release_memory(device)
    return None


def halve_until_fits(
    batch: Batch,
    work: Callable[[Batch], Result],
    halve: Callable[[Batch], Sequence[Batch]],
    *,
    device: torch.device,
    unit: str = "row",
) -> list[Result]:
    """Return the result of `work` on a batch, or, where memory runs out, on its halves and their halves, in order.

    Args:
        halve: divides a batch into smaller ones; returns fewer than two where it can't be divided.
        device: the device whose memory it is.
        unit: what the smallest batch is, for the message.

    Raises:
        NumbersError: memory ran out on a batch that can't be divided.
    """
    if (found := try_to_fit(lambda: work(batch), device)) is not None:
        return [found.value]
    smaller = halve(batch)
    if len(smaller) < 2:
        raise NumbersError(
            f"out of memory with one {unit} at a time",
            fix="set a smaller `max_length` (`generation.max_new_tokens` for completions), or `precision: bf16`",
        )
    log.warning("out of memory: trying again in halves")
    return [result for one in smaller for result in halve_until_fits(one, work, halve, device=device, unit=unit)]
