"""Pieces of text → token ids: control tokens only where a template, or an option, allows them; continued text without a mark.

Control tokens that stand in data are hidden behind plain words while a template is rendered, and come back as mere text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text to put before what continues a text: a newline merges with the least, but some tokenizers drop it.
_ANCHORS = ("\n", "=", ".", "a")


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Some text, or some ids, to be encoded on its own."""

    text: str = ""
    ids: tuple[int, ...] = ()
    """Ids that stand as they are, instead of text."""
    in_loss: bool = False
    literal: bool = True
    """Whether the text of a control token is only text. False where a template wrote it."""
    continues: bool = False
    """Whether text stands before it, so that a tokenizer which marks a text's beginning must not mark this one's."""


class TextSpanEncoder:
    """Encodes text_spans, many at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.begin = self._begin_ids()
        """What the tokenizer itself puts before a text."""
        self._anchors = self._find_anchors()

    def __call__(self, text_spans: Sequence[TextSpan]) -> list[Sequence[int]]:
        """Return each text_span's ids. The tokenizer is called a few times for all of them."""
        ids: list[Sequence[int]] = [text_span.ids for text_span in text_spans]
        for literal in (False, True):
            for continues in (False, True):
                which = [
                    number
                    for number, text_span in enumerate(text_spans)
                    if text_span.text and text_span.literal is literal and text_span.continues is continues
                ]
                texts = [text_spans[number].text for number in which]
                tokenize = self._continued if continues and self._anchors else self._tokenize
                for number, tokens in zip(which, tokenize(texts, literal=literal), strict=True):
                    ids[number] = tokens
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of ids that continue a text: with the blank that some tokenizers drop where a text begins."""
        decode: Callable[..., str] = self.tokenizer.decode
        anchor = self._tokenize(["a"], literal=True)[0]
        before = decode(anchor, clean_up_tokenization_spaces=False)
        return decode([*anchor, *ids], clean_up_tokenization_spaces=False)[len(before) :]

    def _tokenize(self, texts: list[str], *, literal: bool) -> list[list[int]]:
        if not texts:
            return []
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

    def _begin_ids(self) -> tuple[int, ...]:
        bare = self._tokenize(["a"], literal=True)[0]
        full = self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        return ()

    def _find_anchors(self) -> list[tuple[str, list[int]]]:
        """Return texts (and their ids) to put before a text_span that continues another, best first, for tokenizers that mark a
        text's beginning; none for others.
        """
        found = []
        for text in _ANCHORS:
            anchor, text_span, joined = self._tokenize([text, "a", f"{text}a"], literal=True)
            if anchor and joined[: len(anchor)] == anchor:
                if joined[len(anchor) :] == text_span:
                    return []
                found.append((text, anchor))
        return found

    def _continued(self, texts: list[str], *, literal: bool) -> list[list[int]]:
        """Encode texts that stand behind others: without the mark of a text's beginning."""
        found: list[list[int] | None] = [None] * len(texts)
        for anchor, ids in self._anchors:
            left = [number for number, tokens in enumerate(found) if tokens is None]
            for number, tokens in zip(
                left, self._tokenize([anchor + texts[n] for n in left], literal=literal), strict=True
            ):
                # Where the anchor has merged with the text, another one may not.
                if tokens[: len(ids)] == ids:
                    found[number] = tokens[len(ids) :]
        left = [number for number, tokens in enumerate(found) if tokens is None]
        for number, tokens in zip(left, self._tokenize([texts[n] for n in left], literal=literal), strict=True):
            found[number] = tokens
        return [tokens for tokens in found if tokens is not None]
