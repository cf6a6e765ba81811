"""How a model may be forwarded, found by trying it against its own plain forward pass.

Nothing here trusts what a configuration or a class says of itself. A few short sequences are run one by one through the model as
transformers calls it; then as this package would, and the fastest way that gives the same hidden states is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
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
"""Sequences end to end in one row; a padded row each; or each in a forward pass of its own."""

FAILURES = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What a model raises on inputs that it wasn't made for."""


@dataclass(frozen=True)
class Findings:
    """What was found about a model."""

    backbone: nn.Module
    """What maps token ids to hidden states."""
    output_type: type
    """What it returns them in."""
    width: int
    """Width of the hidden states."""
    arrangement: Arrangement
    obstacles: dict[str, str]
    """Why faster arrangements were not taken, by their names."""
    window: int | None
    """Tokens back that some layer attends to, itself included; None where every layer attends to all, or rows aren't packed."""
    longest_row: int | None
    """Tokens in a packed row from which on some layer would count its own positions along the row; None where none does."""
    leak: float
    """Relative change of hidden states when later tokens change: 0 of a causal model, up to rounding."""
    causal: bool
    """Whether the leak is rounding, next to what earlier tokens change."""
    dtype: torch.dtype
    """Of the products that gave them."""


class Unexplained(Exception):
    """The model's hidden states couldn't be reproduced, even for one sequence at a time."""


def tolerance(dtype: torch.dtype, context: float = 1.0) -> float:
    """Return the relative difference of hidden states that is taken for rounding.

    Args:
        dtype: precision of the products.
        context: relative change of hidden states when earlier tokens change. Of a model that isn't trained yet this is so small
            that a leak between sequences would pass for rounding by any fixed measure.
    """
    return min(3e-5, max(2e-6, 1e-2 * context)) if dtype == torch.float32 else 3e-2


@torch.no_grad()
def examine(
    network: Any,
    forward: Callable[[nn.Module, Layout], Tensor],
    *,
    switch: Callable[[bool], None],
    packs: bool,
    precision: torch.dtype | None = None,
) -> Findings:
    """Find a model's backbone, and the fastest arrangement that gives the hidden states of its own forward pass.

    Args:
        network: a transformers model.
        forward: returns the hidden states of a layout under a backbone, flattened to (N, D).
        switch: gives the model attention that knows segments, or its plain one; it is left with what the arrangement needs. Some
            models compute something else under an attention whose name they don't know, so padded rows have the plain one.
        packs: whether packed rows come into question.
        precision: of the products, where attention over segments has no kernel in float32.

    Raises:
        Unexplained: no arrangement does.
    """
    switch(False)
    backbone = find_backbone(network)
    batch = probe_batch(network)
    device, obstacles = batch.device, dict[str, str]()

    def obstacle(own: Tensor, limit: float, *arrangements: Arrangement) -> str | None:
        for arrangement in arrangements:
            try:
                found = _ours(lambda layout: forward(backbone, layout), batch, arrangement).float()
            except FAILURES as failure:
                return describe_error(failure, lines=2)
            error = float((found - own).norm() / own.norm().clamp(min=1e-30))
            if not error < limit:
                return f"its hidden states differ by a factor of {error:.1e}"
        return None

    def findings(arrangement: Arrangement, window: int | None) -> Findings:
        return Findings(
            backbone, kind, own.shape[-1], arrangement, obstacles, window, _row_limit(network), leak, causal, dtype
        )

    with evaluating(network), exact_products(network):
        own, first, kind = _own_hidden(network, backbone, batch)
        dtype, own = own.dtype, own.float()
        leak, context = _dependence(network, backbone, sequence(batch, 0), first.float())
        causal = leak < max(2e-6 if dtype == torch.float32 else 1e-2, 0.05 * context)
        if packs:
            switch(True)
            used = torch.autocast(device.type, dtype=precision) if precision else contextlib.nullcontext()
            with used, windows_seen() as windows:
                # Padded rows too: a sequence that overruns a window is padded, under the same attention.
                reason = obstacle(own, tolerance(precision or dtype, context), "packed", "padded")
            if reason is None:
                return findings("packed", min(windows, default=_window_of(network)))
            obstacles["packed"] = reason
            switch(False)
        for arrangement in ("padded", "alone"):
            reason = obstacle(own, tolerance(dtype, context), arrangement)
            if reason is None:
                return findings(arrangement, None)
            obstacles[arrangement] = reason
    raise Unexplained("; ".join(f"{name}: {reason}" for name, reason in obstacles.items()))


@torch.no_grad()
def odd_company(
    network: Any,
    backbone: nn.Module,
    forward: Callable[[Batch], tuple[Tensor, Layout]],
    batch: Batch,
    precision: torch.dtype | None = None,
) -> bool:
    """Tell whether a model gives responses other hidden states together than each alone, beyond rounding.

    Some models do something else from a length on, which the few tokens of `examine` don't show.

    Args:
        forward: the hidden states of a batch, and its layout.
        batch: responses that would share a forward pass.
        precision: of the products, where attention over segments has no kernel in float32.
    """
    with evaluating(network), exact_products(network):
        used = torch.autocast(batch.device.type, dtype=precision) if precision else contextlib.nullcontext()
        with used:
            hidden, layout = forward(batch)
        # A mixture of experts may choose another one for a token because of rounding, so a few positions may differ.
        limit, share = (1e-4, 0.005) if precision is None and hidden.dtype == torch.float32 else (1e-1, 0.05)
        differing = total = 0
        for row, length in enumerate(batch.response_lengths.tolist()):
            ids = sequence(batch, row)
            own = run_alone(network, backbone, ids)[0][len(ids) - length - 1 : -1].float()
            ours = hidden[layout.before[row, :length]].float()
            differing += int(((ours - own).norm(dim=1) > limit * own.norm(dim=1)).sum())
            total += length
    return differing > 2 + share * total


def probe_batch(network: Any) -> Batch:
    """Return three short responses to two prompts, all of different lengths, of ordinary tokens."""
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


def sequence(batch: Batch, response: int) -> Tensor:
    """Return (L,) the ids of a response behind its prompt."""
    owner, length = int(batch.owner[response]), int(batch.response_lengths[response])
    return torch.cat(
        [batch.prompt_ids[owner, : int(batch.prompt_lengths[owner])], batch.response_ids[response, :length]]
    )


def run_alone(network: Any, backbone: nn.Module, ids: Tensor) -> tuple[Tensor, Any, Any]:
    """Run a model as it is on one sequence (L,); return hidden states (L, D), its output, and its backbone's."""
    with captured(backbone) as outputs:
        output = network(input_ids=ids[None], **accepted(network.forward, use_cache=False))
    return hidden_of(outputs[-1])[0], output, outputs[-1]


def _own_hidden(network: Any, backbone: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, type]:
    """Return (N, D) hidden states from each prompt's last token on, row by row; all of the first row; the type of output."""
    rows: list[Tensor] = []
    kind: type = object
    for response in range(batch.num_responses):
        hidden, _, output = run_alone(network, backbone, sequence(batch, response))
        kind = type(output)
        rows.append(hidden)
    lengths = batch.response_lengths.tolist()
    return torch.cat([row[-length - 1 :] for row, length in zip(rows, lengths, strict=True)]), rows[0], kind


def _dependence(network: Any, backbone: nn.Module, ids: Tensor, hidden: Tensor) -> tuple[float, float]:
    """Return the relative change of hidden states in the middle third when the last third changes, and when the first does.

    Args:
        ids: (L,). hidden: (L, D), its hidden states.
    """
    third = len(ids) // 3
    middle = slice(third, len(ids) - third)
    changes = []
    for changed in (torch.cat([ids[:-third], ids[:third]]), torch.cat([ids[-third:], ids[third:]])):
        difference = run_alone(network, backbone, changed)[0][middle].float() - hidden[middle]
        changes.append(float(difference.norm() / hidden[middle].norm().clamp(min=1e-30)))
    return changes[0], changes[1]


def _ours(forward: Callable[[Layout], Tensor], batch: Batch, arrangement: Arrangement) -> Tensor:
    """Return the same hidden states as `_own_hidden`, in the order of the responses."""
    apart = [torch.tensor([r], device=batch.device) for r in range(batch.num_responses)]
    parts = [batch] if arrangement != "alone" else [of_responses(batch, index) for index in apart]
    rows = []
    for part in parts:
        layout = packed_layout(part) if arrangement == "packed" else padded_layout(part)
        hidden = forward(layout)
        assert layout.at is not None
        for row, length in enumerate(part.response_lengths.tolist()):
            rows.append(hidden[torch.cat([layout.prompt_end[row : row + 1], layout.at[row, :length]])])
    return torch.cat(rows)


def _window_of(network: Any) -> int | None:
    """Return the narrowest window that attention layers carry, for models whose masks are their own."""
    found = [
        value
        for module in network.modules()
        for name in ("sliding_window", "attention_chunk_size", "window_size")
        if isinstance(value := getattr(module, name, None), int) and not isinstance(value, bool) and value > 0
    ]
    return min(found, default=None)


def _row_limit(network: Any) -> int | None:
    """Return from which place in a row on Llama 4 scales its queries: by the place, not by the position in the sequence."""
    scales = [
        int(module.floor_scale) for module in network.modules() if getattr(module, "attn_temperature_tuning", False)
    ]
    return min(scales, default=None)
