"""Tokens that a model doesn't have yet: added to its tokenizer, with embeddings that start as the mean of all others'."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_core.data.named_templates import CONTROL_TOKENS
from rlhf_core.infra.errors import ConfigError

log = logging.getLogger(__name__)

_OPTION = "new_tokens"
_ADDED = "_rlhf_new_tokens"
"""Attribute of a tokenizer: the tokens that were added to it here, and how many it had before. Of a network: their ids."""


def add_to_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> range:
    """Add tokens to a tokenizer, in place, unless this has been done; return their ids.

    They are ordinary tokens: data may use them, and decoding keeps their text. Those that chat templates by name are made of are
    control tokens: in data their text stays text, so that no row can forge a turn.

    Raises:
        ConfigError: it has one of them already.
    """
    before, known = getattr(tokenizer, _ADDED, ((), 0))
    if before == tuple(tokens):
        return range(known, known + len(tokens))
    vocabulary = tokenizer.get_vocab()
    if old := next((token for token in tokens if token in vocabulary), None):
        raise ConfigError(
            "the tokenizer has the token already",
            place=_OPTION,
            got=repr(old),
            fix="leave it out (`dataset.special_tokens` lets data use a control token)",
        )
    from tokenizers import AddedToken

    known = len(tokenizer)
    made = [AddedToken(token, normalized=False, special=token in CONTROL_TOKENS) for token in tokens]
    count = tokenizer.add_tokens(made)
    ids = range(known, known + len(tokens))
    if count != len(tokens) or tokenizer.convert_tokens_to_ids(list(tokens)) != list(ids):
        raise ConfigError("the tokenizer can't take the tokens", place=_OPTION, got=", ".join(map(repr, tokens)))
    setattr(tokenizer, _ADDED, (tuple(tokens), known))
    return ids


def has_embeddings(network: Any, ids: range) -> bool:
    """Tell whether `add_embeddings` gave a transformers model rows for these ids."""
    return getattr(network, _ADDED, None) == ids


@torch.no_grad()
def add_embeddings(network: Any, ids: range) -> None:
    """Give a transformers model rows for new token ids, in place: the mean of the rows of all tokens before them.

    Input embeddings and output layer are the one matrix where they are tied, as before.
    """
    setattr(network, _ADDED, ids)
    rows = network.get_input_embeddings().weight.shape[0]
    if ids.stop > rows:
        network.resize_token_embeddings(ids.stop, mean_resizing=False)
    first, last = network.get_input_embeddings(), network.get_output_embeddings()
    parts = [first.weight] if last is None or last.weight is first.weight else [first.weight, last.weight]
    if last is not None and getattr(last, "bias", None) is not None:
        parts.append(last.bias)
    for part in parts:
        part[ids.start : ids.stop] = part[: ids.start].float().mean(dim=0).to(part.dtype)
    log.info("new tokens: %d, from id %d on; embeddings: %d", len(ids), ids.start, max(rows, ids.stop))


def rows_to_train(network: Any, ids: range) -> dict[str, list[int]]:
    """Return, by the full names of embeddings and of an output layer with weights of its own, the rows of new tokens."""
    first, last = network.get_input_embeddings(), network.get_output_embeddings()
    parts = [first] if last is None or last.weight is first.weight else [first, last]
    names = {id(module): name for name, module in network.named_modules()}
    return {names[id(part)]: list(ids) for part in parts}
