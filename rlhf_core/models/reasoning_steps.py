"""The steps of a response: where they end, found in its token ids, and how their scores become one.

Nothing is decoded and encoded again. Axes: R responses, T response tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from rlhf_core.contracts.batch import Batch

Aggregation = Literal["min", "product", "mean", "last"]


def step_ends(batch: Batch, tokenizer: Any, separator: str) -> Tensor:
    """Return (R, T) bool: the token at which each step of each response ends, on the batch's device.

    A step ends with the token that completes its separator; the last one, if no separator follows it, with the response's last
    token. Blank steps don't count. A response of any tokens has at least one step.
    """
    ends = torch.zeros(batch.response_ids.shape, dtype=torch.bool)
    text_of = _token_texts(tokenizer)
    ids, lengths = batch.response_ids.tolist(), batch.response_lengths.tolist()
    for row, (tokens, length) in enumerate(zip(ids, lengths, strict=True)):
        ends[row, _ends([text_of(token) for token in tokens[:length]], separator)] = True
    return ends.to(batch.device)


def _ends(texts: list[str], separator: str) -> list[int]:
    """Return the indices of the tokens, given by their texts, at which steps end."""
    if not texts:
        return []
    found: list[int] = []
    text, begin = "", 0
    for index, token_text in enumerate(texts):
        text += token_text
        while (at := text.find(separator, begin)) >= 0:
            if text[begin:at].strip():
                found.append(index)
            begin = at + len(separator)
    if text[begin:].strip() or not found:
        found.append(len(texts) - 1)
    return found


@functools.lru_cache(maxsize=8)
def _token_texts(tokenizer: Any) -> Callable[[int], str]:
    """Return a function from a token id to its text, empty for special tokens.

    An id is decoded behind another token: alone, some tokenizers drop the blank that its text begins with.
    """
    special = set(tokenizer.all_special_ids)
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = len(_decoded(tokenizer, anchor))

    @functools.cache
    def text_of(token: int) -> str:
        return "" if token in special else _decoded(tokenizer, [*anchor, token])[before:]

    return text_of


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


# From step scores to one score


def _product(steps: Tensor, ends: Tensor) -> Tensor:
    return (logsigmoid(steps) * ends).sum(dim=1)


def _min(steps: Tensor, ends: Tensor) -> Tensor:
    return steps.masked_fill(~ends, torch.inf).amin(dim=1)


def _mean(steps: Tensor, ends: Tensor) -> Tensor:
    return (steps * ends).sum(dim=1) / ends.sum(dim=1)


def _last(steps: Tensor, ends: Tensor) -> Tensor:
    columns = torch.arange(ends.shape[1], device=ends.device)
    return steps.gather(1, (columns * ends).amax(dim=1, keepdim=True)).squeeze(1)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": _min,
    "product": _product,
    "mean": _mean,
    "last": _last,
}
"""Functions from log-odds (R, T) and the steps' ends (R, T) to (R,): the worst step, the log-probability that all steps are right
if they are independent (Lightman et al. 2023, arXiv 2305.20050, section 2), the mean, or the last step."""
