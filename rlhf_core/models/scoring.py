"""Scores of a whole window without gradients, computed in the micro-batches that memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.infra.devices import is_out_of_memory, release_memory

log = logging.getLogger(__name__)

_COLUMN = "_response"


@torch.no_grad()
def score_in_parts(
    batch: Batch,
    score: Callable[[Batch], Tensor],
    *,
    cut: Callable[[Batch], Sequence[Batch]],
    device: torch.device,
) -> Tensor:
    """Return `score(micro)`, one row a response, put together for the whole batch.

    Args:
        batch: P prompts with R responses.
        score: gives (responses of the micro-batch, ...).
        cut: cuts a batch into micro-batches; one that doesn't fit in memory is halved further.
        device: where micro-batches are scored.

    Returns:
        (R, ...) float32, on the batch's device.
    """
    numbered = batch.attach(per_response={_COLUMN: torch.arange(batch.num_responses, device=batch.device)})
    parts = [part for micro in cut(numbered) for part in _score(micro, score, device)]
    if not parts:
        return torch.zeros(batch.num_responses, device=batch.device)
    numbers, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return values[numbers.argsort()].to(batch.device)


def _score(micro: Batch, score: Callable[[Batch], Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield response numbers with their scores: of the whole micro-batch, or of its halves where memory runs out."""
    values: Tensor | None = None
    try:
        values = score(micro.to(device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or micro.num_prompts == 1:
            raise
    if values is not None:
        yield micro[_COLUMN].cpu(), values.float().cpu()
        return
    # Outside the handler: its traceback would keep the failed forward pass in memory.
    release_memory(device)
    log.warning("out of memory: %d prompts are forwarded in halves", micro.num_prompts)
    for half in micro.split(max_prompts=(micro.num_prompts + 1) // 2):
        yield from _score(half, score, device)
