"""Where the steps of a response end, found in its token ids: nothing is decoded and encoded again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlhf_core.contracts.batch import Batch


def step_ends(batch: Batch, tokenizer: Any, separator: str) -> Tensor:
    """Return (R, T) bool: the token at which each step of each response ends, on the batch's device.

    A step ends with the token that completes its separator; the last one, if no separator follows it, with the response's
    last token. Blank steps are none. A response of any tokens has at least one step.
    """
    ends = torch.zeros(batch.response_ids.shape, dtype=torch.bool)
    piece = _pieces(tokenizer)
    ids, lengths = batch.response_ids.tolist(), batch.response_lengths.tolist()
    for row, (tokens, length) in enumerate(zip(ids, lengths, strict=True)):
        ends[row, _ends([piece(token) for token in tokens[:length]], separator)] = True
    return ends.to(batch.device)


def _ends(pieces: list[str], separator: str) -> list[int]:
    if not pieces:
        return []
    found: list[int] = []
    text, begin = "", 0
    for index, piece in enumerate(pieces):
        text += piece
        while (at := text.find(separator, begin)) >= 0:
            if text[begin:at].strip():
                found.append(index)
            begin = at + len(separator)
    if text[begin:].strip() or not found:
        found.append(len(pieces) - 1)
    return found


@functools.lru_cache(maxsize=8)
def _pieces(tokenizer: Any) -> Callable[[int], str]:
    """Return each id's own text; control tokens have none.

    It is decoded behind another token: alone, some tokenizers drop the blank that a piece begins with.
    """
    special = set(tokenizer.all_special_ids)
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = len(_decoded(tokenizer, anchor))

    @functools.cache
    def piece(token: int) -> str:
        return "" if token in special else _decoded(tokenizer, [*anchor, token])[before:]

    return piece


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
