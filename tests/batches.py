"""Random batches for tests, and a policy whose numbers depend on every token."""

from __future__ import annotations

from dataclasses import replace

import torch

from rlhf_core.contracts.batch import Batch
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


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


def with_empty(batch: Batch, response: int) -> Batch:
    """Return a batch in which one response has no token."""
    lengths = batch.response_lengths.clone()
    lengths[response] = 0
    inside = torch.arange(batch.response_ids.shape[1]) < lengths[:, None]
    return replace(batch, response_lengths=lengths, loss_mask=batch.loss_mask & inside)


def uneven_policy() -> PolicyModel:
    """Return a tiny policy whose matrices are four times as large as at initialisation.

    Its attention is far from uniform, so tokens that see others they shouldn't show in its numbers.
    """
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return PolicyModel(model, tiny_tokenizer())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())
