"""Log-probabilities of tokens, in float32, projecting only the positions that are asked for.

The vocabulary projection of a small model is a quarter of its work and most of its memory, so it never touches prompt or
padding positions, and its logits exist a chunk at a time. Axes: S scored positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 * 2**20
"""Most bytes of float32 logits that exist at once."""


def chunk_rows(vocabulary: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _LinearTokenLogprobs(torch.autograd.Function):
    """log softmax(scale · h Wᵀ)[target] without keeping the logits.

    d logp / d logits = onehot(target) − p, so with upstream g: d h = scale · g (W[target] − p W) and
    d W = scale · Σ g (onehot − p) ⊗ h. Where W is frozen, W[target] − p W is computed in the forward pass, while p is at hand,
    and the backward pass only scales it. Where W learns, p is computed anew in the backward pass, a chunk at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, precision: torch.dtype
    ) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(precision), weight.to(precision)
        rows = chunk_rows(weight.shape[0])
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(logps)
        hidden_learns, weight_learns = ctx.needs_input_grad[:2]
        direction = torch.empty_like(hidden) if hidden_learns and not weight_learns else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = _scaled_logits(hidden[part], weight, scale)
            normaliser = torch.logsumexp(logits, dim=-1)
            normalisers[part] = normaliser
            logps[part] = logits.gather(1, targets[part, None]).squeeze(1) - normaliser
            if direction is not None:
                probabilities = logits.sub_(normaliser[:, None]).exp_()
                direction[part] = (weight[targets[part]] - probabilities.to(weight.dtype) @ weight) * scale
        ctx.scale = scale
        if direction is not None:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(hidden, weight, targets, normalisers)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_learns, weight_learns = ctx.needs_input_grad[:2]
        hidden_dtype, weight_dtype = ctx.dtypes
        if not weight_learns:
            (direction,) = ctx.saved_tensors
            return (direction * upstream[:, None]).to(hidden_dtype), None, None, None, None
        hidden, weight, targets, normalisers = ctx.saved_tensors
        rows = chunk_rows(weight.shape[0])
        d_hidden = torch.empty_like(hidden, dtype=hidden_dtype) if hidden_learns else None
        # In the weight's own precision: sums of 16 bits would lose a bit with every chunk.
        d_weight = torch.zeros_like(weight, dtype=weight_dtype)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            gradient = _scaled_logits(hidden[part], weight, ctx.scale).sub_(normalisers[part, None]).exp_()
            gradient.mul_(-upstream[part, None])
            gradient.scatter_add_(1, targets[part, None], upstream[part, None])
            gradient = gradient.mul_(ctx.scale).to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = gradient @ weight
            if weight.dtype == weight_dtype:
                d_weight.addmm_(gradient.t(), hidden[part])
            else:
                d_weight.add_(gradient.t() @ hidden[part])
        return d_hidden, d_weight, None, None, None


def _scaled_logits(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits.mul_(scale) if scale != 1.0 else logits


def linear_token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return log softmax(scale · hidden weightᵀ) at the targets.

    Args:
        hidden: (S, D), the hidden states that predict the targets.
        weight: (V, D), the output embedding.
        targets: (S,) long.
        scale: factor on the logits, such as 1 / temperature.

    Returns:
        (S,) float32, nats. Matrix products run in autocast's precision, the softmax in float32.
    """
    device = hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        return _LinearTokenLogprobs.apply(hidden, weight, targets, scale, precision)


def module_token_logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The same for any output layer: an adapter on it, a bias, or logits capped by `softcap · tanh(logits / softcap)`.

    Slower than `linear_token_logprobs`: each chunk's logits are computed anew by autograd in the backward pass.
    """

    def logprobs(part: Tensor, wanted: Tensor) -> Tensor:
        logits = head(part).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits * scale, dim=-1).gather(1, wanted[:, None]).squeeze(1)

    with torch.no_grad():
        vocabulary = head(hidden[:1]).shape[-1] if hidden.shape[0] else 1
    parts = zip(hidden.split(chunk_rows(vocabulary)), targets.split(chunk_rows(vocabulary)), strict=True)
    return torch.cat([checkpoint(logprobs, part, wanted, use_reentrant=False) for part, wanted in parts])
