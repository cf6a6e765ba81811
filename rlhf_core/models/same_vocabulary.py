"""Whether two models' token ids mean the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_core.infra.errors import ModelError


def check_same_vocabulary(role: str, model: Any, main: Any, *, main_is: str) -> None:
    """Refuse a model whose token ids mean other tokens than those of the main model.

    Args:
        role: what the model is, for the message: `teacher`.
        model, main: with a `tokenizer`, and a `source` where they have one.
        main_is: words for the main model: `the model that is trained`.

    Raises:
        ModelError: the vocabularies differ; the message has the first id that means another token in each.
    """
    ours, theirs = main.tokenizer, model.tokenizer
    if ours is theirs or ours.get_vocab() == theirs.get_vocab():
        return
    raise ModelError(
        f"the `{role}` has another vocabulary than {main_is}",
        place=str(getattr(model, "source", role)),
        got=vocabulary_difference(
            theirs.get_vocab(), ours.get_vocab(), f"in {getattr(main, 'source', 'the other model')}"
        ),
        fix="use two models of the same tokenizer",
    )


def vocabulary_difference(found: Mapping[str, int], expected: Mapping[str, int], where: str) -> str:
    """Return in words how many tokens two different vocabularies have, and the first id that means another token in each.

    Args:
        where: words for whose vocabulary the expected one is.
    """
    tokens, wanted = ({number: token for token, number in vocabulary.items()} for vocabulary in (found, expected))
    first = min(number for number in tokens.keys() | wanted.keys() if tokens.get(number) != wanted.get(number))
    one, other = (repr(table[first]) if first in table else "no token" for table in (tokens, wanted))
    return f"{len(found):,} tokens, {len(expected):,} {where}; id {first} is {one}, {other} {where}"
