"""Spans of text → token ids, each encoded on its own.

In text from the data, the text of a control token is encoded as text. A span that continues another gets no mark of a text's
beginning (Llama's `▁`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text to put before a span that continues another: a newline merges with the fewest tokens, but some tokenizers drop it.
_ANCHORS = ("\n", "=", ".", "a")


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Text that is encoded on its own, or ids that are inserted as they are."""

    text: str = ""
    ids: tuple[int, ...] = ()
    """Ids instead of text, such as a control token's."""
    in_loss: bool = False
    """Whether its tokens are in the loss."""
    literal: bool = True
    """Whether the text of a control token in it is encoded as text. False for text that a chat template wrote."""
    continues: bool = False
    """Whether other text precedes it, so that a tokenizer which marks a text's beginning (`▁`) must not mark this one's."""


class TextSpanEncoder:
    """Encodes spans of text with one tokenizer, many in one call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.begin = self._begin_ids()
        """Ids that the tokenizer itself adds before a text, such as the beginning token's."""
        self._anchors = self._find_anchors()

    def __call__(self, spans: Sequence[TextSpan]) -> list[Sequence[int]]:
        """Return the ids of each span. The tokenizer is called at most four times, not once per span."""
        ids: list[Sequence[int]] = [span.ids for span in spans]
        for literal in (False, True):
            for continues in (False, True):
                which = [
                    number
                    for number, span in enumerate(spans)
                    if span.text and span.literal is literal and span.continues is continues
                ]
                texts = [spans[number].text for number in which]
                tokenize = self._continued if continues and self._anchors else self._tokenize
                for number, tokens in zip(which, tokenize(texts, literal=literal), strict=True):
                    ids[number] = tokens
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode ids that continue a text, with the blank that some tokenizers drop at the beginning of a text."""
        anchor, length = self._decoding_anchor
        decode: Callable[..., str] = self.tokenizer.decode
        return decode([*anchor, *ids], clean_up_tokenization_spaces=False)[length:]

    @cached_property
    def _decoding_anchor(self) -> tuple[list[int], int]:
        """Ids that are put in front of those to decode, and the length of their text."""
        anchor = self._tokenize(["a"], literal=True)[0]
        return anchor, len(str(self.tokenizer.decode(anchor, clean_up_tokenization_spaces=False)))

    def _tokenize(self, texts: list[str], *, literal: bool) -> list[list[int]]:
        """Return the ids of each text without beginning and end tokens. `literal` encodes the text of control tokens as text."""
        if not texts:
            return []
        if self._is_plain():
            backend = self.tokenizer.backend_tokenizer
            if backend.encode_special_tokens is not literal:
                backend.encode_special_tokens = literal
            backend.no_padding()
            backend.no_truncation()
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=literal,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def remember_words(self, count: int) -> None:
        """Have the tokenizer remember the ids of so many words: by default 10,000, of which larger data have more."""
        resize = getattr(
            getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None), "_resize_cache", None
        )
        if resize is not None:
            resize(count)

    def _is_plain(self) -> bool:
        """Tell whether the tokenizer encodes as those of transformers do: its call is then its backend's, and a sixth slower."""
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

        kind: Any = type(self.tokenizer)
        base: Any = PreTrainedTokenizerFast
        return kind.__call__ is PreTrainedTokenizerBase.__call__ and kind._encode_plus is base._encode_plus

    def _begin_ids(self) -> tuple[int, ...]:
        """Return the ids that the tokenizer adds before a text: those before a word when it adds special tokens."""
        bare = self._tokenize(["a"], literal=True)[0]
        full = self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        return ()

    def _find_anchors(self) -> list[tuple[str, list[int]]]:
        """Return (text, ids) pairs to put before a span that continues another, in the order to try them.

        Empty for tokenizers that don't mark the beginning of a text, where nothing needs to be put before one.
        """
        found = []
        for text in _ANCHORS:
            anchor, span, joined = self._tokenize([text, "a", f"{text}a"], literal=True)
            if anchor and joined[: len(anchor)] == anchor:
                if joined[len(anchor) :] == span:
                    return []
                found.append((text, anchor))
        return found

    def _continued(self, texts: list[str], *, literal: bool) -> list[list[int]]:
        """Encode texts that continue others: put an anchor before each, and drop the anchor's ids."""
        found: list[list[int] | None] = [None] * len(texts)
        for anchor, ids in self._anchors:
            left = [number for number, tokens in enumerate(found) if tokens is None]
            for number, tokens in zip(
                left, self._tokenize([anchor + texts[n] for n in left], literal=literal), strict=True
            ):
                # Where this anchor merged with the text, the next one may not.
                if tokens[: len(ids)] == ids:
                    found[number] = tokens[len(ids) :]
        left = [number for number, tokens in enumerate(found) if tokens is None]
        for number, tokens in zip(left, self._tokenize([texts[n] for n in left], literal=literal), strict=True):
            found[number] = tokens
        return [tokens for tokens in found if tokens is not None]
