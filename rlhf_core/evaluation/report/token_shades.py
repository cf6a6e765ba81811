"""The tokens of a kept completion with the probability of each, for a page that shades them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.evaluation.report.blocks import Token
from rlhf_core.evaluation.report.run_files import is_number
from rlhf_core.training.row_log import unpacked_tokens

Decode = Callable[[Sequence[int]], list[str] | None]
"""Returns the text of each token id; None where they can't be decoded."""


def tokens_of(row: Mapping[str, Any], decode: Decode | None) -> list[Token]:
    """Return a completion's tokens with their probabilities, or its text as one token without, where they aren't kept.

    Args:
        row: of `rollouts.jsonl`, `samples.jsonl`, or of sampled rows.
        decode: of the tokenizer that the completion was made with.
    """
    plain = [Token(str(row.get("completion", "")), None)]
    drawn = _drawn(row)
    if decode is None or drawn is None:
        return plain
    ids, logprobs = drawn
    texts = decode(ids) if ids else None
    if texts is None or len(texts) != len(logprobs):
        return plain
    return _whole(texts, [math.exp(min(0.0, one)) for one in logprobs]) or plain


def find_decoder(*directories: Path) -> Decode | None:
    """Return the decoder of the first directory that holds a tokenizer; None where none does."""
    for directory in directories:
        file = directory / "tokenizer.json"
        if not file.is_file():
            continue
        try:
            from tokenizers import Tokenizer

            return _decoder(Tokenizer.from_file(str(file)))
        except Exception:  # the library raises plain `Exception` for a file that it can't read
            continue
    return None


def _decoder(tokenizer: Any) -> Decode:
    from tokenizers.decoders import DecodeStream

    def decode(ids: Sequence[int]) -> list[str] | None:
        stream = DecodeStream(skip_special_tokens=True)
        try:
            return [stream.step(tokenizer, one) or "" for one in ids]
        except Exception:  # plain `Exception` too: ids that the tokenizer doesn't know
            return None

    return decode


def _drawn(row: Mapping[str, Any]) -> tuple[list[int], list[float]] | None:
    """Return a row's token ids and log-probabilities; None where it has none, or they don't fit each other."""
    if (packed := unpacked_tokens(row)) is not None:
        return packed
    ids, logprobs = row.get("completion_ids"), row.get("logprobs")
    if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs):
        return None
    whole = all(type(one) is int and one >= 0 for one in ids) and all(map(is_number, logprobs))
    return (ids, logprobs) if whole else None


def _whole(texts: Sequence[str], probabilities: Sequence[float]) -> list[Token]:
    """Return the tokens; those that have no text of their own, being parts of a character, are one with the next that has.

    Its probability is the product of theirs. What remains at the end, such as the end token, is left out.
    """
    made, together = [], 1.0
    for text, probability in zip(texts, probabilities, strict=True):
        together *= probability
        if text:
            made.append(Token(text, together))
            together = 1.0
    return made
