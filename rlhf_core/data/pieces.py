"""Pieces of text → token ids: control tokens only where a template, or an option, allows them; continued text without a mark.

Control tokens that stand in data are hidden behind plain words while a template is rendered, and come back as mere text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.infra.errors import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALLOWED = "dataset.special_tokens"

# Text to put before what continues a text: a newline merges with the least, but some tokenizers drop it.
_ANCHORS = ("\n", "=", ".", "a")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, or some ids, to be encoded on its own."""

    text: str = ""
    ids: tuple[int, ...] = ()
    """Ids that stand as they are, instead of text."""
    in_loss: bool = False
    literal: bool = True
    """Whether the text of a control token is only text. False where a template wrote it."""
    continues: bool = False
    """Whether text stands before it, so that a tokenizer which marks a text's beginning must not mark this one's."""


class ControlTokens:
    """The tokenizer's special tokens, as they would look in text.

    Args:
        allowed: those that data may use; in texts too they are encoded as themselves.

    Raises:
        ConfigError: the tokenizer has no such token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, allowed: Sequence[str] = ()) -> None:
        added = tokenizer.added_tokens_decoder
        self.tokens = {token.content: (number, token) for number, token in added.items() if token.special}
        known = {token.content: (number, token) for number, token in added.items()}
        for name in allowed:
            if name not in known:
                near = nearest(name, known)
                fix = f"did you mean `{near}`?" if near else "add it to the tokenizer, and an embedding to the model"
                raise ConfigError("the tokenizer has no such token", place=ALLOWED, got=repr(name), fix=fix)
        self.tokens |= {name: known[name] for name in allowed}
        self.pattern = _any_of(self.tokens)
        self._hidden = _any_of([name for name in self.tokens if name not in allowed])
        self._allowed = _any_of(allowed)
        self._all = tuple(name for name in known if name)
        # Some tokenizers mark a text's beginning behind a control token too.
        after, alone = (
            (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{next(iter(self.tokens))}a", "a"))
            if self.tokens
            else ([], [])
        )
        self._begins_text = after[1:] == alone

    def within(self, text: str) -> list[str]:
        """Return what in the text looks like control tokens that data may not use."""
        return self._hidden.findall(text) if self._hidden else []

    def allows(self, text: str) -> bool:
        """Tell whether the text holds a control token that data may use."""
        return self._allowed is not None and self._allowed.search(text) is not None

    def at(self, text: str, position: int = 0) -> re.Match[str] | None:
        """Return the control token that stands at a position, or None."""
        return self.pattern.match(text, position) if self.pattern else None

    def matches(self, text: str) -> list[re.Match[str]]:
        """Return the control tokens in a text that a template wrote."""
        return list(self.pattern.finditer(text)) if self.pattern else []

    def closed_end(self, text: str) -> int | None:
        """Return where the last control token ends if only white space stands behind it, else None."""
        found = self.matches(text)
        return found[-1].end() if found and not text[found[-1].end() :].strip() else None

    def whole_until(self, text: str, position: int) -> int:
        """Return the position, moved to the beginning of a control token that it would cut in two."""
        return next((m.start() for m in self.matches(text) if m.start() < position < m.end()), position)

    def continued(self, before: str) -> bool:
        """Tell whether the tokenizer takes what follows this text as its continuation, not as a text's beginning."""
        return not (self._begins_text and self._all and before.endswith(self._all))

    def hidden(self, text: str, mark: str) -> str:
        """Return the text with each control token replaced by a plain word that `mark` makes unmistakable."""
        if self._hidden is None:
            return text
        numbers = {name: number for number, name in enumerate(self.tokens)}
        return self._hidden.sub(lambda match: f"{mark}{numbers[match.group()]}z", text)

    def shown(self, text: str, mark: str) -> str:
        """Undo `hidden`."""
        names = list(self.tokens)
        return re.sub(rf"{mark}(\d+)z", lambda match: names[int(match.group(1))], text)

    def text_pieces(self, text: str, *, in_loss: bool = False, continues: bool = False) -> list[Piece]:
        """Cut a text from the data at the control tokens that it may use; the rest is text."""
        if self.allows(text):
            return self.cut(text, self._allowed, in_loss=in_loss, continues=continues)
        return [Piece(text, in_loss=in_loss, continues=continues)] if text else []

    def pieces(self, text: str, mark: str | None, *, in_loss: bool = False, continues: bool = False) -> list[Piece]:
        """Return rendered text as pieces. Where something in it is hidden it is cut at its true control tokens, and what was
        hidden is text again in the pieces between.
        """
        if mark is None or mark not in text:
            return [Piece(text, in_loss=in_loss, literal=False, continues=continues)] if text else []
        cut = self.cut(text, self.pattern, in_loss=in_loss, continues=continues)
        return [replace(piece, text=self.shown(piece.text, mark)) for piece in cut]

    def cut(
        self, text: str, pattern: re.Pattern[str] | None, *, in_loss: bool = False, continues: bool = False
    ) -> list[Piece]:
        """Cut a text at the control tokens that a pattern finds; what stands between is only text."""
        pieces: list[Piece] = []
        parts = re.split(f"({pattern.pattern})", text) if pattern else [text]
        for number, part in enumerate(parts):
            if number % 2:
                pieces.append(Piece(ids=(self.tokens[part][0],), in_loss=in_loss))
                continue
            # As the tokenizer does: some control tokens swallow the white space beside them.
            if number and self.tokens[parts[number - 1]][1].rstrip:
                part = part.lstrip()
            if number + 1 < len(parts) and self.tokens[parts[number + 1]][1].lstrip:
                part = part.rstrip()
            if part:
                pieces.append(Piece(part, in_loss=in_loss, continues=not self._begins_text if number else continues))
        return pieces


def _any_of(names: Any) -> re.Pattern[str] | None:
    ordered = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


class PieceEncoder:
    """Encodes pieces, many at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.begin = self._begin_ids()
        """What the tokenizer itself puts before a text."""
        self._anchors = self._find_anchors()

    def __call__(self, pieces: Sequence[Piece]) -> list[Sequence[int]]:
        """Return each piece's ids. The tokenizer is called a few times for all of them."""
        ids: list[Sequence[int]] = [piece.ids for piece in pieces]
        for literal in (False, True):
            for continues in (False, True):
                which = [
                    number
                    for number, piece in enumerate(pieces)
                    if piece.text and piece.literal is literal and piece.continues is continues
                ]
                texts = [pieces[number].text for number in which]
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
        """Return texts (and their ids) to put before a piece that continues another, best first, for tokenizers that mark a
        text's beginning; none for others.
        """
        found = []
        for text in _ANCHORS:
            anchor, piece, joined = self._tokenize([text, "a", f"{text}a"], literal=True)
            if anchor and joined[: len(anchor)] == anchor:
                if joined[len(anchor) :] == piece:
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
