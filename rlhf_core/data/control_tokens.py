"""Control tokens (the tokenizer's special tokens) as they look in text: where they may stand, and where they are mere text.

Those that stand in data are hidden behind plain words while a chat template is rendered, and come back as mere text.
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

    def spans_in_text(self, text: str, *, in_loss: bool = False, continues: bool = False) -> list[TextSpan]:
        """Cut a text from the data at the control tokens that it may use; the rest is text."""
        if self.allows(text):
            return self.cut(text, self._allowed, in_loss=in_loss, continues=continues)
        return [TextSpan(text, in_loss=in_loss, continues=continues)] if text else []

    def rendered_spans(
        self, text: str, mark: str | None, *, in_loss: bool = False, continues: bool = False
    ) -> list[TextSpan]:
        """Return rendered text as text_spans. Where something in it is hidden it is cut at its true control tokens, and what was
        hidden is text again in the text_spans between.
        """
        if mark is None or mark not in text:
            return [TextSpan(text, in_loss=in_loss, literal=False, continues=continues)] if text else []
        cut = self.cut(text, self.pattern, in_loss=in_loss, continues=continues)
        return [replace(text_span, text=self.shown(text_span.text, mark)) for text_span in cut]

    def cut(
        self, text: str, pattern: re.Pattern[str] | None, *, in_loss: bool = False, continues: bool = False
    ) -> list[TextSpan]:
        """Cut a text at the control tokens that a pattern finds; what stands between is only text."""
        text_spans: list[TextSpan] = []
        parts = re.split(f"({pattern.pattern})", text) if pattern else [text]
        for number, part in enumerate(parts):
            if number % 2:
                text_spans.append(TextSpan(ids=(self.tokens[part][0],), in_loss=in_loss))
                continue
            # As the tokenizer does: some control tokens swallow the white space beside them.
            if number and self.tokens[parts[number - 1]][1].rstrip:
                part = part.lstrip()
            if number + 1 < len(parts) and self.tokens[parts[number + 1]][1].lstrip:
                part = part.rstrip()
            if part:
                text_spans.append(
                    TextSpan(part, in_loss=in_loss, continues=not self._begins_text if number else continues)
                )
        return text_spans


def _any_of(names: Any) -> re.Pattern[str] | None:
    ordered = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
