"""Labels of steps, and how well they are judged. Axes: P pairs, R = 2P responses, T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.batch import Batch

RIGHT, WRONG, NO_LABEL = 1.0, -1.0, 0.0
"""Labels of steps as a column: padding, which is 0, has none."""


def ranked(values: Tensor) -> tuple[Tensor, float]:
    """Return for each pair whether the chosen one has the larger value, ties counting half."""
    above, equal = values[:, 0] > values[:, 1], values[:, 0] == values[:, 1]
    return above.float() + 0.5 * equal.float(), len(values)


def step_metrics(batch: Batch, steps: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return how many labelled steps are judged rightly, and in how many solutions the first wrong step is found."""
    known = labels != NO_LABEL
    right = (steps > 0) == (labels == RIGHT)
    false, judged = first_wrong(labels == WRONG), first_wrong((steps <= 0) & known)
    whole = known.any(dim=1)
    has_error = (whole & (false >= 0)).float()
    clean = (whole & (false < 0)).float()

    def by_prompt(values: Tensor) -> Tensor:
        return torch.zeros(batch.num_prompts, device=values.device).index_add(0, batch.owner, values.float())

    return {
        "step_accuracy": (by_prompt((right & known).sum(dim=1)), by_prompt(known.sum(dim=1))),
        "first_error_found": (by_prompt((judged == false).float() * has_error), by_prompt(has_error)),
        "right_let_pass": (by_prompt((judged < 0).float() * clean), by_prompt(clean)),
    }


def first_wrong(wrong: Tensor) -> Tensor:
    """Return (R,) the first column where `wrong` (R, T) is set, −1 where none is."""
    return torch.where(wrong.any(dim=1), wrong.float().argmax(dim=1), -1)
