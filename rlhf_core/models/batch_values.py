"""Values of a whole batch without gradients, computed in micro-batches that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import PluginError
from rlhf_core.infra.out_of_memory import halve_until_fits

Axis = Literal["prompt", "response", "token"]
Values = TypeVar("Values", Tensor, tuple[Tensor, ...])

_PROMPT, _RESPONSE = "_prompt", "_response"


@torch.no_grad()
def batch_values(
    batch: Batch,
    function: Callable[[Batch], Values],
    *,
    axis: Axis | tuple[Axis, ...] = "response",
    cut: Callable[[Batch], Sequence[Batch]] = lambda batch: [batch],
    device: torch.device | None = None,
) -> Values:
    """Return a function's values for a batch, computed in micro-batches and joined in the batch's order.

    Args:
        batch: P prompts with R responses of at most T tokens.
        function: returns for a micro-batch of p prompts with r responses of at most t tokens a tensor of (p, ...), (r, ...) or
            (r, t, ...) values, depending on the axis, or a tuple of such tensors. It must accept a batch without rows.
        axis: whether values are per prompt, response or token; for a tuple of tensors of different axes, the axis of each. With
            `prompt` among them, a prompt's responses stay in one micro-batch.
        cut: cuts a batch into micro-batches; by default there is one. A micro-batch that doesn't fit in memory is halved.
        device: where micro-batches are computed; None for the batch's device.

    Returns:
        (P, ...), (R, ...) or (R, T, ...) on the batch's device, floating values as float32; 0 at tokens beyond the width of their
        micro-batch.
    """
    device = device or batch.device
    numbered = batch.attach(
        per_prompt={_PROMPT: torch.arange(batch.num_prompts, device=batch.device)},
        per_response={_RESPONSE: torch.arange(batch.num_responses, device=batch.device)},
    )
    several, whole = False, "prompt" in (axis if isinstance(axis, tuple) else (axis,))
    parts: list[tuple[dict[str, Tensor], tuple[Tensor, ...]]] = []

    def work(micro: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        nonlocal several
        found = function(micro.to(device))
        several = isinstance(found, tuple)
        values = found if isinstance(found, tuple) else (found,)
        for value, own in zip(values, _axes(axis, len(values)), strict=True):
            _check(value, micro, own)
        return {name: micro[name].cpu() for name in (_PROMPT, _RESPONSE)}, tuple(_plain(value) for value in values)

    for micro in cut(numbered) or [numbered]:
        parts += halve_until_fits(micro, work, lambda part: halves(part, divide=not whole), device=device)
    width = batch.response_ids.shape[1]
    joined = []
    columns = list(zip(*(values for _, values in parts), strict=True))
    for column, own in zip(columns, _axes(axis, len(columns)), strict=True):
        rows = torch.cat([numbers[_PROMPT if own == "prompt" else _RESPONSE] for numbers, _ in parts])
        widened = [_widened(value, width) for value in column] if own == "token" else column
        joined.append(torch.cat(list(widened))[rows.argsort()].to(batch.device))
    return tuple(joined) if several else joined[0]  # type: ignore[return-value]


def _axes(axis: Axis | tuple[Axis, ...], count: int) -> tuple[Axis, ...]:
    """Return the axis of each of `count` tensors, from one axis for all or a tuple of one each."""
    if not isinstance(axis, tuple):
        return (axis,) * count
    if len(axis) != count:
        raise PluginError(
            f"{len(axis)} axes are named for {count} tensors", place="run.forward", got=axis,
            fix="name one `axis` for each tensor that the function returns, or one for all",
        )  # fmt: skip
    return axis


def halves(batch: Batch, *, divide: bool) -> list[Batch]:
    """Cut a batch in two between prompts, or with `divide` between its only prompt's responses; return [batch] where it can't."""
    if batch.num_prompts > 1:
        return batch.split(size=(batch.num_prompts + 1) // 2)
    if divide and batch.num_responses > 1:
        return batch.split(size=(batch.num_responses + 1) // 2, divide=True)
    return [batch]


def _check(value: object, micro: Batch, axis: Axis) -> None:
    """Raise PluginError where a method's values for a micro-batch don't begin with the shape of their axis."""
    tokens = tuple(micro.response_ids.shape)
    wanted = {"prompt": (micro.num_prompts,), "response": (micro.num_responses,), "token": tokens}[axis]
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if got[: len(wanted)] != wanted:
        raise PluginError(
            f"the values of axis `{axis}` must begin with shape {wanted}", place="run.forward", got=got,
            fix="return values for every row of the micro-batch, or name another `axis`",
        )  # fmt: skip


def _plain(value: Tensor) -> Tensor:
    """Return values on the CPU, floating ones in float32."""
    return (value.float() if value.is_floating_point() else value).cpu()


def _widened(value: Tensor, width: int) -> Tensor:
    """Return (r, t, ...) values as (r, width, ...), filled with 0 on the right."""
    return torch.cat([value, value.new_zeros(value.shape[0], width - value.shape[1], *value.shape[2:])], dim=1)
