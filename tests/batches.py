"""Random batches for tests."""

from __future__ import annotations

import torch

from rlhf_core.contracts.batch import Batch


def random_batch(
    prompts: int = 4,
    responses: int = 2,
    *,
    vocabulary: int = 200,
    longest: int = 9,
    seed: int = 0,
    masked: bool = False,
) -> Batch:
    """Return prompts with so many responses each, of random ids and unequal lengths; `masked` leaves gaps in the loss mask."""
    generator = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows = prompts * responses
    prompt_lengths, lengths = ints(1, longest + 1, prompts), ints(1, longest + 1, rows)
    prompt_width, width = int(prompt_lengths.max()), int(lengths.max())
    inside = torch.arange(width) < lengths[:, None]
    if masked:
        inside = inside & (torch.rand(rows, width, generator=generator) < 0.6)
    return Batch(
        prompt_ids=ints(0, vocabulary, prompts, prompt_width),
        prompt_lengths=prompt_lengths,
        response_ids=ints(0, vocabulary, rows, width),
        response_lengths=lengths,
        owner=torch.arange(prompts).repeat_interleave(responses),
        loss_mask=inside,
        rows=tuple(range(prompts)),
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())
