"""How a network may be forwarded, measured by comparison with its own plain forward pass.

Nothing here relies on what a configuration or a class claims. A few short sequences are run one by one through the model as
transformers calls it, then in each arrangement that this package knows; the fastest that gives the same hidden states is taken.

Axes: R responses, L tokens of a sequence, N hidden states, D their width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import describe_error
from rlhf_core.models.attention import windows_seen
from rlhf_core.models.backbone import accepted, captured, find_backbone, hidden_of, plain_ids
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.layout import Layout, of_responses, packed_layout, padded_layout
from rlhf_core.models.precision import exact_products

Arrangement = Literal["packed", "padded", "alone"]
"""Sequences end to end in one row; one padded row per sequence; or one forward pass per sequence."""

FAILURES = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What a model raises on inputs that it wasn't made for."""


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Return ‖found − wanted‖ / ‖wanted − the mean of its row‖, by which two ways of computing (N, X) are compared."""
    spread = (wanted - wanted.mean(dim=1, keepdim=True)).norm()
    return float((found - wanted).norm() / spread)


@dataclass(frozen=True)
class ProbeResult:
    """What was measured about a network."""

    backbone: nn.Module
    """The part that maps token ids to hidden states."""
    output_type: type
    """The type in which the backbone returns them."""
    width: int
    """Width of the hidden states."""
    arrangement: Arrangement
    """The fastest arrangement that gives the network's own hidden states."""
    obstacles: dict[str, str]
    """Faster arrangement → why it wasn't taken."""
    window: int | None
    """Tokens back that some layer attends to, itself included; None where all layers attend to all, or rows aren't packed."""
    longest_row: int | None
    """Tokens in a packed row from which on some layer would count positions along the row; None where none does."""
    leak: float
    """Relative change of hidden states when later tokens change: 0 for a causal model, up to rounding."""
    causal: bool
    """Whether the leak is no more than rounding, compared with the change that earlier tokens make."""
    dtype: torch.dtype
    """Dtype of the hidden states that were compared."""


class NotReproduced(Exception):
    """The network's hidden states couldn't be reproduced, even for one sequence at a time."""


def tolerance(dtype: torch.dtype, context: float = 1.0) -> float:
    """Return the relative difference of hidden states that counts as rounding.

    Args:
        dtype: of the matrix products.
        context: relative change of hidden states when earlier tokens change. An untrained model's is so small that a leak
            between sequences would pass for rounding by any fixed measure.
    """
    return min(3e-5, max(2e-6, 1e-2 * context)) if dtype == torch.float32 else 3e-2


@torch.no_grad()
def probe_network(
    network: Any,
    forward: Callable[[nn.Module, Layout], Tensor],
    *,
    set_attention: Callable[[bool], None],
    packs: bool,
    autocast_dtype: torch.dtype | None = None,
) -> ProbeResult:
    """Find a network's backbone, and the fastest arrangement that gives the hidden states of its own forward pass.

    Args:
        network: a transformers model.
        forward: returns a backbone's hidden states for a layout, (N, D).
        set_attention: gives the network attention that knows segments (True) or its plain one (False); afterwards it has the one
            that the arrangement needs. Padded rows get the plain one: some models compute something else under an attention
            whose name they don't know.
        packs: whether packed rows are tried.
        autocast_dtype: dtype of products in packed rows where attention over segments has no kernel in float32, else None.

    Raises:
        NotReproduced: no arrangement gives them.
    """
    set_attention(False)
    backbone = find_backbone(network)
    batch = _probe_batch(network)
    with evaluating(network), exact_products(network):
        own, first, output_type = _own_hidden(network, backbone, batch)
        dtype, own = own.dtype, own.float()
        leak, context = _dependence(network, backbone, sequence(batch, 0), first.float())
        causal = leak < max(2e-6 if dtype == torch.float32 else 1e-2, 0.05 * context)

        def obstacle(limit: float, *arrangements: Arrangement) -> str | None:
            reasons = (_obstacle(lambda lay: forward(backbone, lay), batch, own, limit, kind) for kind in arrangements)
            return next((reason for reason in reasons if reason is not None), None)

        def result(arrangement: Arrangement, window: int | None = None) -> ProbeResult:
            limit, width = _row_limit(network), own.shape[-1]
            return ProbeResult(backbone, output_type, width, arrangement, obstacles, window, limit, leak, causal, dtype)

        obstacles: dict[str, str] = {}
        if packs:
            set_attention(True)
            with _autocast(batch.device, autocast_dtype), windows_seen() as windows:
                # Padded rows too: a sequence longer than a window is padded, under the same attention.
                reason = obstacle(tolerance(autocast_dtype or dtype, context), "packed", "padded")
            if reason is None:
                return result("packed", min(windows, default=_window_of(network)))
            obstacles["packed"] = reason
            set_attention(False)
        for arrangement in ("padded", "alone"):
            reason = obstacle(tolerance(dtype, context), arrangement)
            if reason is None:
                return result(arrangement)
            obstacles[arrangement] = reason
    raise NotReproduced("; ".join(f"{name}: {reason}" for name, reason in obstacles.items()))


@torch.no_grad()
def differs_together(
    network: Any,
    backbone: nn.Module,
    forward: Callable[[Batch], tuple[Tensor, Layout]],
    batch: Batch,
    autocast_dtype: torch.dtype | None = None,
) -> bool:
    """Tell whether responses have other hidden states in one forward pass than each alone, beyond rounding.

    Some models change what they compute from a length on, which the short sequences of `probe_network` don't show.

    Args:
        forward: returns the hidden states (N, D) of a batch in one forward pass, and its layout.
        batch: responses that would share a forward pass.
        autocast_dtype: as for `probe_network`.
    """
    with evaluating(network), exact_products(network):
        with _autocast(batch.device, autocast_dtype):
            hidden, layout = forward(batch)
        # A mixture of experts may choose another expert for a token because of rounding, so a few positions may differ.
        exact = autocast_dtype is None and hidden.dtype == torch.float32
        limit, share = (1e-4, 0.005) if exact else (1e-1, 0.05)
        differing = total = 0
        for row, length in enumerate(batch.response_lengths.tolist()):
            ids = sequence(batch, row)
            own = run_alone(network, backbone, ids)[0][len(ids) - length - 1 : -1].float()
            ours = hidden[layout.before[row, :length]].float()
            differing += int(((ours - own).norm(dim=1) > limit * own.norm(dim=1)).sum())
            total += length
    return differing > 2 + share * total


def sequence(batch: Batch, response: int) -> Tensor:
    """Return (L,) the ids of one response behind its prompt."""
    owner, length = int(batch.owner[response]), int(batch.response_lengths[response])
    return torch.cat(
        [batch.prompt_ids[owner, : int(batch.prompt_lengths[owner])], batch.response_ids[response, :length]]
    )


def run_alone(network: Any, backbone: nn.Module, ids: Tensor) -> tuple[Tensor, Any, Any]:
    """Run a model as transformers calls it on one sequence (L,).

    Returns:
        Hidden states (L, D), the model's output, and its backbone's output.
    """
    with captured(backbone) as outputs:
        output = network(input_ids=ids[None], **accepted(network.forward, use_cache=False))
    return hidden_of(outputs[-1])[0], output, outputs[-1]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def _probe_batch(network: Any) -> Batch:
    """Return three responses of 4, 2 and 3 ordinary tokens to two prompts of 5 and 3."""
    ids = plain_ids(network, 22)
    lengths = torch.tensor([4, 2, 3], device=ids.device)
    return Batch(
        prompt_ids=ids[:10].view(2, 5),
        prompt_lengths=torch.tensor([5, 3], device=ids.device),
        response_ids=ids[10:].view(3, 4),
        response_lengths=lengths,
        owner=torch.tensor([0, 0, 1], device=ids.device),
        loss_mask=torch.arange(4, device=ids.device) < lengths[:, None],
        rows=(0, 1),
    )


def _obstacle(
    forward: Callable[[Layout], Tensor], batch: Batch, own: Tensor, limit: float, arrangement: Arrangement
) -> str | None:
    """Return why an arrangement doesn't give a model's own hidden states (N, D) of a batch, in words; None where it does.

    Args:
        forward: returns the hidden states of a layout.
        limit: relative difference that counts as rounding.
    """
    try:
        found = _arranged_hidden(forward, batch, arrangement).float()
    except FAILURES as failure:
        return describe_error(failure, lines=2)
    error = float((found - own).norm() / own.norm().clamp(min=1e-30))
    return None if error < limit else f"its hidden states differ by a factor of {error:.1e}"


def _own_hidden(network: Any, backbone: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, type]:
    """Run a batch's sequences one by one.

    Returns:
        (N, D) hidden states from each prompt's last token on, response by response; all (L, D) of the first sequence; and the
        type of the backbone's output.
    """
    rows: list[Tensor] = []
    output_type: type = object
    for response in range(batch.num_responses):
        hidden, _, output = run_alone(network, backbone, sequence(batch, response))
        output_type = type(output)
        rows.append(hidden)
    lengths = batch.response_lengths.tolist()
    own = torch.cat([row[-length - 1 :] for row, length in zip(rows, lengths, strict=True)])
    return own, rows[0], output_type


def _arranged_hidden(forward: Callable[[Layout], Tensor], batch: Batch, arrangement: Arrangement) -> Tensor:
    """Return (N, D) the same hidden states as `_own_hidden`, computed in an arrangement."""
    apart = [torch.tensor([r], device=batch.device) for r in range(batch.num_responses)]
    passes = [batch] if arrangement != "alone" else [of_responses(batch, index) for index in apart]
    rows = []
    for one in passes:
        layout = packed_layout(one) if arrangement == "packed" else padded_layout(one)
        hidden = forward(layout)
        assert layout.at is not None
        for row, length in enumerate(one.response_lengths.tolist()):
            rows.append(hidden[torch.cat([layout.prompt_end[row : row + 1], layout.at[row, :length]])])
    return torch.cat(rows)


def _dependence(network: Any, backbone: nn.Module, ids: Tensor, hidden: Tensor) -> tuple[float, float]:
    """Return the relative change of hidden states in a sequence's middle third when its last third changes, and its first.

    Args:
        ids: (L,).
        hidden: (L, D), the hidden states of `ids`.
    """
    third = len(ids) // 3
    middle = slice(third, len(ids) - third)
    changes = []
    for changed in (torch.cat([ids[:-third], ids[:third]]), torch.cat([ids[-third:], ids[third:]])):
        difference = run_alone(network, backbone, changed)[0][middle].float() - hidden[middle]
        changes.append(float(difference.norm() / hidden[middle].norm().clamp(min=1e-30)))
    return changes[0], changes[1]


def _window_of(network: Any) -> int | None:
    """Return the narrowest sliding window that attention layers name, in tokens, for models that build their own masks."""
    found = [
        value
        for module in network.modules()
        for name in ("sliding_window", "attention_chunk_size", "window_size")
        if isinstance(value := getattr(module, name, None), int) and not isinstance(value, bool) and value > 0
    ]
    return min(found, default=None)


def _row_limit(network: Any) -> int | None:
    """Return the place in a row from which on Llama 4 scales queries by their place in it; None for other models."""
    scales = [
        int(module.floor_scale) for module in network.modules() if getattr(module, "attn_temperature_tuning", False)
    ]
    return min(scales, default=None)
