"""Log-probabilities of tokens, in float32, with logits computed only at the positions that are asked for.

The projection to the vocabulary is a quarter of a small model's work and most of its memory. So prompt and padding positions
aren't projected, and only a few chunks of logits are in memory at once.

Axes: S scored positions, D width of hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf_core.models.cpu_products import add_product, multiply, multiply_into
from rlhf_core.models.gradient_sums import open_gradient

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 64 * 2**20, 512 * 2**20
"""Most bytes of float32 logits in one chunk. A GPU needs more rows to be busy."""
KEPT_CHUNKS = 4
"""Most chunks of logits that are kept for the backward pass; of more, all are computed again there."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return how many positions' logits make a chunk on a device."""
    chunk_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(1, chunk_bytes // (4 * vocabulary))


class _LinearTokenLogprobs(torch.autograd.Function):
    """log softmax(scale · h Wᵀ)[target] for hidden states h (S, D), output embedding W (V, D) and targets (S,); returns (S,).

    With the errors e = softmax − onehot(target) (S, V) and the upstream gradient g (S,): d h = −scale · g ⊙ (e W) and
    d W = −scale · eᵀ (g ⊙ h). Where W is frozen, e W is computed in the forward pass, while e is in memory, and the backward pass
    only scales it. Where W is trained, e is kept if it is small, and else computed again in the backward pass, chunk by chunk.

    onehot is subtracted in float32, before e is rounded to the products' dtype: where the model is sure of a token, softmax and
    onehot agree in all the bits that bf16 has.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, precision: torch.dtype
    ) -> Tensor:
        """Return the targets' log-probabilities, (S,) float32, in chunks, so that (S, V) logits are never all in memory.

        For the backward pass it keeps the gradient of h where only h needs one, the errors e where W is trained and they are few,
        else the inputs alone.

        Args:
            hidden: (S, D). weight: (V, D). targets: (S,) token ids.
            scale: factor of the logits. precision: dtype of the matrix products.
        """
        ctx.dtypes, ctx.scale, ctx.weight = (hidden.dtype, weight.dtype), scale, weight
        hidden, weight = hidden.to(precision), weight.to(precision)
        hidden_learns, weight_learns = ctx.needs_input_grad[:2]
        rows = chunk_rows(weight.shape[0], hidden.device)
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        kept = direction = None
        if weight_learns and hidden.shape[0] <= KEPT_CHUNKS * rows:
            kept = hidden.new_empty(hidden.shape[0], weight.shape[0])
        elif hidden_learns and not weight_learns:
            direction = torch.empty_like(hidden)
        logits = _Logits(weight, scale, min(rows, hidden.shape[0]))
        for part in _chunks(hidden.shape[0], rows):
            found = logits(hidden[part], out=kept[part] if kept is not None else None)
            logps[part] = _target_logprobs(found, targets[part], errors=ctx.needs_input_grad[0] or weight_learns)
            if direction is not None:
                multiply_into(direction[part], found.to(precision), weight)
            elif kept is not None and found.dtype != precision:
                kept[part] = found
        if direction is not None:
            ctx.save_for_backward(direction)
        elif weight_learns:
            ctx.save_for_backward(hidden, weight, targets, kept)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients of h (S, D) and W (V, D) for the upstream gradient (S,); None for one that isn't trained."""
        hidden_learns, weight_learns = ctx.needs_input_grad[:2]
        hidden_dtype, weight_dtype = ctx.dtypes
        factors = (-ctx.scale * upstream)[:, None]
        if not weight_learns:
            (direction,) = ctx.saved_tensors
            return (direction * factors).to(hidden_dtype), None, None, None, None
        hidden, weight, targets, kept = ctx.saved_tensors
        rows = chunk_rows(weight.shape[0], hidden.device) if kept is None else hidden.shape[0]
        logits = _Logits(weight, ctx.scale, 0 if kept is not None else min(rows, hidden.shape[0]))
        d_hidden = torch.empty_like(hidden, dtype=hidden_dtype) if hidden_learns else None
        # In the weight's own dtype: sums in 16 bits would lose a bit with every chunk.
        into = open_gradient(ctx.weight)
        d_weight = torch.zeros_like(weight, dtype=weight_dtype) if into is None else into
        for part in _chunks(hidden.shape[0], rows):
            if kept is not None:
                errors = kept
            else:
                errors = logits(hidden[part])
                _target_logprobs(errors, targets[part], errors=True)
                errors = errors.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = multiply(errors, weight) * factors[part]
            scaled = (hidden[part] * factors[part]).to(weight.dtype)
            if weight.dtype == weight_dtype:
                add_product(d_weight, errors.t(), scaled)
            else:
                d_weight.add_(multiply(errors.t(), scaled))
        return d_hidden, d_weight if into is None else None, None, None, None


class _ExactLogSoftmax(torch.autograd.Function):
    """x − log Σ exp x over the last axis, with the gradient g − softmax(x) Σ g; keeps the result alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        """Return (..., V) for logits (..., V)."""
        logps = logits - logits.amax(dim=-1, keepdim=True)
        logps.sub_(logps.exp().sum(dim=-1, keepdim=True).log_())
        ctx.save_for_backward(logps)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        """Return the gradient of the logits (..., V) for the upstream gradient (..., V)."""
        (logps,) = ctx.saved_tensors
        return torch.addcmul(upstream, logps.exp(), upstream.sum(dim=-1, keepdim=True), value=-1)


def exact_log_softmax(logits: Tensor) -> Tensor:
    """Return log softmax(logits) over the last axis, (..., V), whose probabilities add up to 1 in any vocabulary.

    Those of `torch.log_softmax` add up to 1 ± 1e-5 on a CPU for 150,000 tokens, for its sum runs through the vocabulary in order.
    A masked token, of logit −inf, has a log-probability of −inf.
    """
    if not torch.is_grad_enabled():
        # As in `linear_token_logprobs`.
        logits = logits.detach()
    return cast(Tensor, _ExactLogSoftmax.apply(logits))


class _Logits:
    """Computes chunks of float32 logits in one buffer; a new buffer per chunk would cost page faults.

    Args:
        weight: (V, D). scale: factor on the logits. rows: most positions in a chunk.
    """

    def __init__(self, weight: Tensor, scale: float, rows: int) -> None:
        self.weight, self.scale, self.rows = weight, scale, rows
        self.product: Tensor | None = None
        self.logits: Tensor | None = None

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return scale · h Wᵀ (s, V) for h (s, D), in `out` where weights are float32; the next call may overwrite the result."""
        shape, dtype = (self.rows, self.weight.shape[0]), self.weight.dtype
        if dtype == torch.float32 and out is not None:
            product = out
        else:
            if self.product is None:
                self.product = self.weight.new_empty(shape)
            product = self.product[: len(hidden)]
        multiply_into(product, hidden, self.weight.t())
        if dtype == torch.float32:
            logits = product
        else:
            if self.logits is None:
                self.logits = self.weight.new_empty(shape, dtype=torch.float32)
            logits = self.logits[: len(hidden)].copy_(product)
        return logits.mul_(self.scale) if self.scale != 1.0 else logits


def _target_logprobs(logits: Tensor, targets: Tensor, *, errors: bool) -> Tensor:
    """Return (S,) log softmax(logits)[target]; the logits (S, V) are overwritten, with `errors` by softmax − onehot."""
    chosen = targets[:, None]
    peaks = logits.amax(dim=-1, keepdim=True)
    picked = logits.gather(1, chosen)
    totals = logits.sub_(peaks).exp_().sum(dim=-1, keepdim=True)
    if errors:
        logits.div_(totals).scatter_add_(1, chosen, torch.full_like(totals, -1.0))
    return (picked - peaks - totals.log()).squeeze(1)


def _chunks(length: int, rows: int) -> Iterator[slice]:
    """Return slices of at most `rows` that cover 0 … length."""
    return (slice(start, start + rows) for start in range(0, length, max(rows, 1)))


def linear_token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return log softmax(scale · hidden weightᵀ) at the targets.

    Args:
        hidden: (S, D), the hidden states that predict the targets.
        weight: (V, D), the output embedding.
        targets: (S,) long, token ids.
        scale: factor on the logits, such as 1 / temperature.

    Returns:
        (S,) float32, nats. Matrix products run in autocast's dtype, the softmax in float32.
    """
    if not torch.is_grad_enabled():
        # An autograd function can't see that gradients are off, and would save tensors for its backward pass.
        hidden, weight = hidden.detach(), weight.detach()
    device = hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        return _LinearTokenLogprobs.apply(hidden, weight, targets, scale, precision)


def module_token_logprobs(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, scale: float = 1.0
) -> Tensor:
    """Return log softmax(scale · logits(hidden)) at the targets, (S,) float32, nats, for any output layer.

    For layers with an adapter, a bias or a cap. Slower than `linear_token_logprobs`: autograd computes each chunk's logits a
    second time in the backward pass.

    Args:
        logits: a function from hidden states (s, D) to logits (s, V).
        hidden: (S, D). targets: (S,) long, token ids.
        scale: factor on the logits, such as 1 / temperature.
    """

    def logprobs(table: Tensor, wanted: Tensor) -> Tensor:
        return exact_log_softmax(table.float() * scale).gather(1, wanted[:, None]).squeeze(1)

    return over_vocabulary(logprobs, (logits, hidden), columns=[targets])


ResultT = TypeVar("ResultT", Tensor, tuple[Tensor, ...])


def over_vocabulary(
    function: Callable[..., ResultT],
    *models: tuple[Callable[[Tensor], Tensor], Tensor],
    columns: Sequence[Tensor] = (),
) -> ResultT:
    """Return a function of the whole vocabulary's logits at each hidden state, with few rows of logits in memory at once.

    For losses that need more than the log-probability of one token: a divergence between two policies, an entropy.

        def forward_kl(student, teacher):  # (s, V) each
            p = teacher.log_softmax(-1)
            return (p.exp() * (p - student.log_softmax(-1))).sum(-1)

        over_vocabulary(forward_kl, (student.logits, states.predicting()), (teacher.logits, others.predicting()))

    Gradients are exact: autograd computes each chunk's logits a second time in the backward pass.

    Args:
        function: takes logits (s, V) of each model, in order, then s entries of each column; returns (s, ...), or a tuple of
            such tensors. Each row of the result must depend on its own row of the arguments alone. V may differ between models.
        models: for each, a function from hidden states to logits (`PolicyModel.logits`) and its hidden states (S, D).
        columns: further tensors with one entry per state, (S, ...).

    Returns:
        (S, ...), or a tuple of such.
    """
    states: list[Tensor] = [hidden for _, hidden in models]
    lengths = {len(rows) for rows in (*states, *columns)}
    if len(lengths) != 1:
        raise ValueError(f"hidden states and columns must have one length, got {[len(r) for r in (*states, *columns)]}")

    def of_chunk(*rows: Tensor) -> ResultT:
        tables = [logits(part) for (logits, _), part in zip(models, rows, strict=False)]
        return function(*tables, *rows[len(models) :])

    if not lengths.pop():
        return of_chunk(*states, *columns)
    with torch.no_grad():
        width = sum(logits(hidden[:1]).shape[-1] for logits, hidden in models)
    rows = chunk_rows(width, states[0].device)
    parts = zip(*(tensor.split(rows) for tensor in (*states, *columns)), strict=True)
    found: list[Any] = [checkpoint(of_chunk, *part, use_reentrant=False) for part in parts]
    joined: Any = torch.cat(found) if isinstance(found[0], Tensor) else tuple(map(torch.cat, zip(*found, strict=True)))
    return joined
