"""Which attention over segments a GPU without flash-attn takes: PyTorch's own variable-length kernel where it has proved itself.

PyTorch ships flash-attn's kernels under a name of its own, without a promise. So on each device the kernel is tried first, on a
few tokens, against attention in padded rows; what raises or differs isn't used, and the reason is logged.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_core.infra.errors import describe_error
from rlhf_core.models.gpu_attention import flash_segment_attention, padded_segment_attention
from rlhf_core.models.layout import Segment, Segments

log = logging.getLogger(__name__)

MAX_DIFFERENCE = 2e-2
"""Of outputs and gradients in 16 bits, relative. A mask that is off by one token differs by a factor of ten more."""
WIDEST = 256
"""Head width that the kernel goes up to."""


def torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """Call PyTorch's variable-length kernel as flash-attn's: its causal mask is aligned to the end of the keys.

    The operator itself, and not `torch.nn.attention.varlen`, which takes other arguments from one release to the next and costs
    the host more than the kernel does the GPU.
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, query_starts, key_starts, longest_query, longest_key, dropout_p, causal, False,
        scale=softmax_scale,
    )[0]  # fmt: skip


def gpu_segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attend within segments and their prefixes: what `attention.segment_attention` computes, in one or two kernel calls."""
    kind = query.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    heads, width = (query.shape[1], key.shape[1]), query.shape[3]
    if (
        kind == "cuda"
        and not dropout
        and precision in (torch.bfloat16, torch.float16)
        and width == value.shape[3] <= WIDEST
        and width % 8 == 0
        and _works(query.device, precision, *heads, width)
    ):
        return flash_segment_attention(query, key, value, segments, scale=scale, kernel=torch_varlen)
    return padded_segment_attention(query, key, value, segments, scale=scale, dropout=dropout)


@functools.cache
def _works(device: torch.device, precision: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    obstacle = kernel_obstacle(torch_varlen, device, precision, heads, key_heads, width)
    if obstacle is not None:
        log.info("PyTorch's variable-length attention isn't used, rows are padded for attention: %s", obstacle)
    return obstacle is None


@torch.enable_grad()
def kernel_obstacle(
    kernel: Callable[..., Tensor],
    device: torch.device,
    precision: torch.dtype,
    heads: int,
    key_heads: int,
    width: int,
) -> str | None:
    """Try a kernel with flash-attn's arguments, forwards and backwards; return what is wrong with it, None where it is right."""
    segments = Segments(
        [Segment(0, 67), Segment(67, 3, 0, 60), Segment(70, 130, 0, 60), Segment(200, 1), Segment(201, 30)]
    )
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(1, count, 231, width, generator=generator).to(device, precision)

    inputs = [draw(heads), draw(key_heads), draw(key_heads)]
    upstream = draw(heads).transpose(1, 2)

    def attempt(attend: Callable[..., Tensor]) -> list[Tensor]:
        own = [tensor.detach().requires_grad_() for tensor in inputs]
        out = attend(*own, segments, scale=width**-0.5)
        return [out.detach(), *torch.autograd.grad(out, own, upstream)]

    try:
        with torch.autocast(device.type, enabled=False):
            found = attempt(functools.partial(flash_segment_attention, kernel=kernel))
            expected = attempt(padded_segment_attention)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return describe_error(error, lines=1)
    for name, mine, other in zip(("output", "queries", "keys", "values"), found, expected, strict=True):
        difference = float((mine.float() - other.float()).norm() / other.float().norm())
        if not difference < MAX_DIFFERENCE:  # NaN isn't, either
            return f"its {name} differ{'s' if name == 'output' else ' in their gradient'} by {difference:.1e}"
    return None
