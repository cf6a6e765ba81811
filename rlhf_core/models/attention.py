"""Attention over segments that share prefixes, plugged into unmodified transformers models; and the choice of kernel.

A model whose attention implementation is one of ours behaves as with the kernel underneath until a forward pass hands it
`segments` (see `layout`); then queries of each segment see its prefix and themselves, and nothing else. Axes: H heads,
K key-value heads, N tokens of the packed row, D head width.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_core.infra.errors import ConfigError
from rlhf_core.models.gpu_attention import flash_segment_attention
from rlhf_core.models.layout import Segment, Segments
from rlhf_core.models.varlen import gpu_segment_attention

Kernel = Literal["auto", "flash", "sdpa", "eager"]
PREFIX = "rlhf_"


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
        """Name under which the segment-aware version is registered; eager attention has none and takes padded rows."""
        return self.base if self.kernel == "eager" else PREFIX + self.base

    @classmethod
    def select(cls, wanted: Kernel = "auto", *, device: torch.device, dtype: torch.dtype) -> OptimizedAttention:
        """Choose flash-attn where it is installed and the device and precision allow it, else SDPA.

        Raises:
            ConfigError: `flash` was asked for and can't run here.
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attend within segments and their prefixes, one kernel call a segment: no padding and no mask over the whole row.

    The natural choice on a CPU, where a call costs microseconds and wasted products cost seconds.

    Args:
        query: (1, H, N, D). key, value: (1, K, N, D), K dividing H.
        segments: who sees whom; they tile the row in order.

    Returns:
        (1, N, H, D).
    """
    precision = value.dtype
    # CPU kernels are slower in bf16 than in float32 here, most of all backwards; autocast would cast down again.
    query, key, value = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return _attend_each(query, key, value, segments, scale, dropout).to(precision)


def _attend_each(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float, dropout: float
) -> Tensor:
    starts = {segment.start: i for i, segment in enumerate(segments)}
    lengths = [segment.length for segment in segments]
    # `split` has one backward node that concatenates; slices would each write a gradient of the whole row.
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, dropout_p=dropout, enable_gqa=True)
    outputs = []
    for i, segment in enumerate(segments):
        if not segment.prefix_length:
            out = attend(queries[i], keys[i], values[i], is_causal=True)
        else:
            owner = starts[segment.prefix_start]
            prefix = segment.prefix_length
            k = torch.cat([keys[owner][:, :, :prefix], keys[i]], dim=2)
            v = torch.cat([values[owner][:, :, :prefix], values[i]], dim=2)
            mask = _suffix_mask(segment, query.device)
            out = attend(queries[i], k, v, attn_mask=mask)
        outputs.append(out)
    # Copied once, into the order that some models view as rows.
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1)


def _suffix_mask(segment: Segment, device: torch.device) -> Tensor:
    """Return (length, prefix + length) bool: a suffix sees its whole prefix, and itself causally."""
    return torch.ones(segment.length, segment.keys, dtype=torch.bool, device=device).tril(segment.prefix_length)


_windows: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("windows", default=None)


@contextlib.contextmanager
def windows_seen() -> Iterator[list[int]]:
    """Collect the windows of the masks that models ask for meanwhile: how many tokens back a layer attends to."""
    seen: list[int] = []
    token = _windows.set(seen)
    try:
        yield seen
    finally:
        _windows.reset(token)


_PLAIN = ("position_ids", "cache_position")
"""Tensors that models hand to attention beside queries, keys and values without a meaning for it."""


def _check_plain(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise where a layer's attention is more than segments say: a mask of the model's own, a bias, a cap, sinks."""
    extra = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _PLAIN]
    if kwargs.get("softcap") is not None:
        extra.append("softcap")
    if attention_mask is not None and attention_mask.numel() > 1:
        extra.append("a mask of its own")
    if extra:
        raise ValueError(f"packed rows can't have attention with {extra[0]}")


def _register(base: str) -> None:
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
        segments: Segments | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        _check_plain(attention_mask, kwargs)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if base == "flash_attention_2":
            attend: Callable[..., Tensor] = flash_segment_attention
        else:
            attend = segment_attention if query.device.type == "cpu" else gpu_segment_attention
        return attend(query, key, value, segments, scale=scale, dropout=dropout), None

    AttentionInterface.register(PREFIX + base, forward)
    AttentionMaskInterface.register(PREFIX + base, make_mask)


for _base in ("sdpa", "flash_attention_2"):
    _register(_base)
