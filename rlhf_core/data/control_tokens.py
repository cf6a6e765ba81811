"""Control tokens (the tokenizer's special tokens) in text: those that a chat template wrote, and lookalikes in the data.

The text of a control token in data must not become the token. While a chat template is rendered it is replaced by a plain word,
and the rendered text is split at its true control tokens before the words are replaced back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_core.data.text_spans import TextSpan
from rlhf_core.infra.errors import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALLOWED = "dataset.special_tokens"


class ControlTokens:
    """Finds a tokenizer's control tokens in text.

    Args:
        allowed: control tokens that data may use (`dataset.special_tokens`); in texts of the data too they are the tokens.

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
        # Some tokenizers mark a text's beginning after a control token, too.
        after, alone = (
            (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{next(iter(self.tokens))}a", "a"))
            if self.tokens
            else ([], [])
        )
        self._begins_text = after[1:] == alone

    def within(self, text: str) -> list[str]:
        """Return the texts of control tokens in a text of the data, without those that data may use."""
        return self._hidden.findall(text) if self._hidden else []

    def allows(self, text: str) -> bool:
        """Return whether a text of the data has a control token that data may use."""
        return self._allowed is not None and self._allowed.search(text) is not None

    def at(self, text: str, position: int = 0) -> re.Match[str] | None:
        """Return the match of a control token that begins at a position, or None."""
        return self.pattern.match(text, position) if self.pattern else None

    def matches(self, text: str) -> list[re.Match[str]]:
        """Return the matches of all control tokens in a text that a chat template wrote."""
        return list(self.pattern.finditer(text)) if self.pattern else []

    def closed_end(self, text: str) -> int | None:
        """Return the offset at which the last control token ends if only white space follows it, else None."""
        found = self.matches(text)
        return found[-1].end() if found and not text[found[-1].end() :].strip() else None

    def whole_until(self, text: str, position: int) -> int:
        """Return a position, or where it is inside of a control token, the position at which that begins."""
        return next((m.start() for m in self.matches(text) if m.start() < position < m.end()), position)

    def continued(self, before: str) -> bool:
        """Return whether the tokenizer encodes what follows this text as its continuation, without the mark of a beginning."""
        return not (self._begins_text and self._all and before.endswith(self._all))

    def hidden(self, text: str, mark: str) -> str:
        """Return a text of the data with words that begin with `mark` in place of the control tokens that it may not use."""
        if self._hidden is None:
            return text
        numbers = {name: number for number, name in enumerate(self.tokens)}
        return self._hidden.sub(lambda match: f"{mark}{numbers[match.group()]}z", text)

    def shown(self, text: str, mark: str) -> str:
        """Return a text with the words that `hidden` put in replaced back."""
        names = list(self.tokens)
        return re.sub(rf"{mark}(\d+)z", lambda match: names[int(match.group(1))], text)

    def spans_in_text(self, text: str, *, in_loss: bool = False, continues: bool = False) -> list[TextSpan]:
        """Split a text of the data at the control tokens that data may use; everything else is encoded as text."""
        if self.allows(text):
            return self.split(text, self._allowed, in_loss=in_loss, continues=continues)
        return [TextSpan(text, in_loss=in_loss, continues=continues)] if text else []

    def rendered_spans(
        self, text: str, mark: str | None, *, in_loss: bool = False, continues: bool = False
    ) -> list[TextSpan]:
        """Return text that a chat template rendered as spans.

        Where words replace control tokens from the data in it (they begin with `mark`; None where there are none), the text is
        split at its true control tokens, and the words are replaced back in the spans between them.
        """
        if mark is None or mark not in text:
            return [TextSpan(text, in_loss=in_loss, literal=False, continues=continues)] if text else []
        cut = self.split(text, self.pattern, in_loss=in_loss, continues=continues)
        return [replace(span, text=self.shown(span.text, mark)) for span in cut]

    def split(
        self, text: str, pattern: re.Pattern[str] | None, *, in_loss: bool = False, continues: bool = False
    ) -> list[TextSpan]:
        """Split a text at the control tokens that a pattern finds; what is between them is encoded as text."""
        spans: list[TextSpan] = []
        parts = re.split(f"({pattern.pattern})", text) if pattern else [text]
        for number, part in enumerate(parts):
            if number % 2:
                spans.append(TextSpan(ids=(self.tokens[part][0],), in_loss=in_loss))
                continue
            # As the tokenizer does: some control tokens include the white space beside them.
            if number and self.tokens[parts[number - 1]][1].rstrip:
                part = part.lstrip()
            if number + 1 < len(parts) and self.tokens[parts[number + 1]][1].lstrip:
                part = part.rstrip()
            if part:
                spans.append(TextSpan(part, in_loss=in_loss, continues=not self._begins_text if number else continues))
        return spans


def _any_of(names: Any) -> re.Pattern[str] | None:
    """Return a pattern that matches any of the names, the longest first; None where there are none."""
    ordered = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
