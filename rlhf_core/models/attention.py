"""Which attention kernel a model runs with, and how attention over packed segments reaches unmodified transformers models.

Two attention functions are registered with transformers, `rlhf_sdpa` and `rlhf_flash_attention_2`. A model set to one of them
behaves as with the kernel of that name, until a forward pass hands it `segments` (see `layout.Segments`): then each segment's
queries see the segment's prefix and the segment itself, and nothing else in the row.

Axes: H query heads, K key-value heads, N tokens of the packed row, D head width.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_core.infra.errors import ConfigError, describe_error
from rlhf_core.models.layout import AttentionOverCache, Segment, Segments
from rlhf_core.models.segment_attention import attend_in_padded_rows, attend_on_cpu, attend_varlen

log = logging.getLogger(__name__)

Kernel = Literal["auto", "flash", "sdpa", "eager"]
REGISTERED_PREFIX = "rlhf_"
MAX_KERNEL_DIFFERENCE = 2e-2
"""Most relative difference of outputs and gradients between kernels in 16 bits; a mask off by one token makes ten times that."""
MAX_HEAD_WIDTH = 256
"""Widest head that PyTorch's variable-length kernel takes."""


# The choice of a kernel


@dataclass(frozen=True)
class OptimizedAttention:
    """The attention kernel that a model runs with, and why that one."""

    kernel: Literal["flash", "sdpa", "eager"]
    reason: str

    @property
    def base(self) -> str:
        """Name of the kernel in transformers."""
        return "flash_attention_2" if self.kernel == "flash" else self.kernel

    @property
    def implementation(self) -> str:
        """Name of the registered function that knows segments; eager attention has none, so its rows are padded."""
        return self.base if self.kernel == "eager" else REGISTERED_PREFIX + self.base

    @classmethod
    def select(cls, wanted: Kernel = "auto", *, device: torch.device, dtype: torch.dtype) -> OptimizedAttention:
        """Choose flash-attn where it is installed and the device and dtype allow it, else SDPA.

        Args:
            wanted: the option `attention`; another value than `auto` decides.
            dtype: of the matrix products.

        Raises:
            ConfigError: `wanted` is `flash`, which this device or dtype can't run.
        """
        if wanted in ("sdpa", "eager"):
            return cls(wanted, "as asked")
        obstacle = _flash_obstacle(device, dtype)
        if obstacle is None:
            return cls("flash", "flash-attn is installed and the device allows it" if wanted == "auto" else "as asked")
        if wanted == "flash":
            raise ConfigError(
                "flash attention can't be used", place="attention", got=obstacle, fix="use `attention: auto` or `sdpa`"
            )
        return cls("sdpa", f"flash-attn can't be used: {obstacle}")


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why flash-attn can't run on a device in a dtype, or None where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}, and it needs CUDA"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"precision is {str(dtype).removeprefix('torch.')}, and it needs bf16 or fp16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn isn't installed (extra `flash-attn`)"
    return None


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attend within segments and their prefixes without flash-attn, in the way that is fastest on the tensors' device.

    On a CPU, one call per segment, or padded rows where segments are many and small. On a GPU, PyTorch's own variable-length
    kernel where it takes such inputs and was tried and found right on this device, else padded rows.

    Args:
        query: (1, H, N, D).
        key: (1, K, N, D), K dividing H. value: the same.
        segments: which tokens see which; they cover the row in order.
        scale: factor on the products of queries and keys.
        dropout: probability with which an attention weight is dropped.

    Returns:
        (1, N, H, D).
    """
    kind = query.device.type
    if kind == "cpu":
        return attend_on_cpu(query, key, value, segments, scale=scale, dropout=dropout)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    width = query.shape[3]
    if (
        kind == "cuda"
        and not dropout
        and dtype in (torch.bfloat16, torch.float16)
        and width == value.shape[3] <= MAX_HEAD_WIDTH
        and width % 8 == 0
        and _torch_varlen_is_right(query.device, dtype, query.shape[1], key.shape[1], width)
    ):
        return attend_varlen(query, key, value, segments, scale=scale, kernel=torch_varlen)
    return attend_in_padded_rows(query, key, value, segments, scale=scale, dropout=dropout)


# PyTorch's own variable-length kernel


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
    """Call PyTorch's variable-length kernel with flash-attn's arguments; its causal mask is aligned to the end of the keys.

    This is the operator itself: `torch.nn.attention.varlen` takes other arguments from one release to the next, and costs the
    host more time than the kernel costs the GPU.

    Args:
        query: (tokens, H, D). key: (keys, K, D). value: the same.
        query_starts: (segments + 1,) int32, where each segment's queries begin. key_starts: the same for its keys.

    Returns:
        (tokens, H, D).
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, query_starts, key_starts, longest_query, longest_key, dropout_p, causal, False,
        scale=softmax_scale,
    )[0]  # fmt: skip


@functools.cache
def _torch_varlen_is_right(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    """Tell whether PyTorch's kernel was found right on a device for such inputs; log the reason once where it wasn't.

    PyTorch ships flash-attn's kernels under a private name and promises nothing about them, so they are tried first.
    """
    obstacle = kernel_obstacle(torch_varlen, device, dtype, heads, key_heads, width)
    if obstacle is not None:
        log.info("attention pads its rows, since PyTorch's variable-length kernel can't be used: %s", obstacle)
    return obstacle is None


@torch.enable_grad()
def kernel_obstacle(
    kernel: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    width: int,
) -> str | None:
    """Compare a variable-length kernel with attention in padded rows, forward and backward, on 231 random tokens.

    Args:
        kernel: a function with flash-attn's arguments, such as `torch_varlen`.
        heads: H. key_heads: K. width: D.

    Returns:
        What is wrong with the kernel, in words; None where outputs and gradients agree up to rounding.
    """
    segments = Segments(
        [Segment(0, 67), Segment(67, 3, 0, 60), Segment(70, 130, 0, 60), Segment(200, 1), Segment(201, 30)]
    )
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(1, count, 231, width, generator=generator).to(device, dtype)

    inputs = [draw(heads), draw(key_heads), draw(key_heads)]
    upstream = draw(heads).transpose(1, 2)

    def output_and_gradients(attend: Callable[..., Tensor]) -> list[Tensor]:
        own = [tensor.detach().requires_grad_() for tensor in inputs]
        out = attend(*own, segments, scale=width**-0.5)
        return [out.detach(), *torch.autograd.grad(out, own, upstream)]

    try:
        with torch.autocast(device.type, enabled=False):
            found = output_and_gradients(functools.partial(attend_varlen, kernel=kernel))
            expected = output_and_gradients(attend_in_padded_rows)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return describe_error(error, lines=1)
    for name, mine, other in zip(("output", "queries", "keys", "values"), found, expected, strict=True):
        difference = float((mine.float() - other.float()).norm() / other.float().norm())
        if not difference < MAX_KERNEL_DIFFERENCE:  # so written that NaN counts as wrong
            return f"its {name} differ{'s' if name == 'output' else ' in their gradient'} by {difference:.1e}"
    return None


# The functions that are registered with transformers


_windows: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("windows", default=None)


@contextlib.contextmanager
def windows_seen() -> Iterator[list[int]]:
    """Collect the sliding windows of the masks that models ask for inside the context: tokens back that a layer attends to."""
    seen: list[int] = []
    token = _windows.set(seen)
    try:
        yield seen
    finally:
        _windows.reset(token)


_HARMLESS = ("position_ids", "cache_position")
"""Tensors that models hand to attention functions and that don't change attention."""


def _check_plain(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise ValueError where a layer's attention is more than segments describe: its own mask, a bias, a soft cap, sinks."""
    extra = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _HARMLESS]
    if kwargs.get("softcap") is not None:
        extra.append("a soft cap")
    if attention_mask is not None and attention_mask.numel() > 1:
        extra.append("a mask built by the model")
    if extra:
        raise ValueError(f"the packed layout doesn't support attention with {extra[0]}")


def _register(base: str) -> None:
    """Register `rlhf_BASE` with transformers: its kernel `base`, and attention over segments where a forward pass gives them."""
    plain, plain_mask = ALL_ATTENTION_FUNCTIONS[base], ALL_MASK_ATTENTION_FUNCTIONS[base]

    def make_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Any:
        if local_size and (seen := _windows.get()) is not None:
            seen.append(int(local_size))
        return plain_mask(*args, local_size=local_size, **kwargs)

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        segments: Segments | AttentionOverCache | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        _check_plain(attention_mask, kwargs)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if not isinstance(segments, Segments):
            return segments.attend(module, query, key, value, scale=scale), None
        attend = attend_varlen if base == "flash_attention_2" else segment_attention
        return attend(query, key, value, segments, scale=scale, dropout=dropout), None

    AttentionInterface.register(REGISTERED_PREFIX + base, forward)
    AttentionMaskInterface.register(REGISTERED_PREFIX + base, make_mask)


for _base in ("sdpa", "flash_attention_2"):
    _register(_base)
