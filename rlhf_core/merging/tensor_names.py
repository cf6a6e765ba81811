"""What the name of a tensor says of it, in any architecture: its layer, and whether it is an embedding, a head or in a group.

Importing this imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rlhf_core.infra.model_files import HEADS

OUTPUT_HEADS = ("lm_head", "embed_out")
"""Names of the output head, which predicts tokens."""
GROUPS = {
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "experts"),
    "embeddings": ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embeddings"),
    "head": (*OUTPUT_HEADS, *HEADS),
    "norms": ("norm", "ln_1", "ln_2", "ln_f"),
}
"""Groups of tensors by parts of their names, in all architectures."""
_TOKEN_ROWS = {*GROUPS["embeddings"], *OUTPUT_HEADS, "shared", "output_layer"} - {"wpe"}
_LAYER = re.compile(r"((?:^|.*?\.)(?:layers|layer|h|blocks|block)\.)(\d+)\.")


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to; None outside the layers."""
    found = _LAYER.match(name)
    return int(found[2]) if found else None


def layer_prefix(name: str) -> str | None:
    """Return the part of a tensor's name before the layer's number; None outside the layers."""
    found = _LAYER.match(name)
    return found[1] if found else None


def depth_of(names: Iterable[str]) -> int:
    """Return the number of layers that tensors of these names belong to; 0 where there are none."""
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def in_group(name: str, group: str) -> bool:
    """Tell whether a tensor belongs to one of `GROUPS`."""
    parts = name.split(".")
    return any(part in GROUPS[group] or (group == "norms" and "norm" in part) for part in parts)


def is_embedding(name: str) -> bool:
    """Tell whether a tensor maps tokens to vectors or back."""
    return is_head(name) or in_group(name, "embeddings")


def is_head(name: str) -> bool:
    """Tell whether a tensor is the matrix of the output head: not its bias, nor a layer before it."""
    return name.split(".")[-2:] in ([module, "weight"] for module in OUTPUT_HEADS)


def score_head_of(name: str) -> str | None:
    """Return the head beside the weights that a tensor is of, `reward_head` for `reward_head.0.outer.weight`; else None."""
    head = name.partition(".")[0]
    return head if head in HEADS else None


def has_token_rows(name: str, tensor: Any) -> bool:
    """Tell whether a tensor (anything with shape and dtype) is a matrix with a row per token: embeddings or an output head."""
    module, last = name.split(".")[-2:] if "." in name else ("", name)
    matrix = len(tensor.shape) == 2 and tensor.dtype.is_floating_point
    return matrix and last == "weight" and module in _TOKEN_ROWS
