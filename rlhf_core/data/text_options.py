"""How text becomes ids, kept with the tokenizer: whoever loads a model encodes prompts as they were in its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.data.chat_rendering import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.config.training import DatasetConfig

KEY = "rlhf_core"
"""Under which the settings stand in tokenizer_config.json."""


@dataclass(frozen=True)
class TextOptions:
    """What a model's training said of its texts; None where it said nothing."""

    wrap: Literal["none", "chat"] | None = None
    special_tokens: Sequence[str] | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TextOptions:
        """Return what is kept with a tokenizer. What isn't of the right kind there isn't ours, and counts as nothing."""
        kept: Any = tokenizer.init_kwargs.get(KEY)
        if not isinstance(kept, dict):
            return cls()
        wrap, tokens = kept.get("wrap"), kept.get("special_tokens")
        names = isinstance(tokens, list) and all(isinstance(name, str) for name in tokens)
        return cls(wrap if wrap in ("none", "chat") else None, tokens if names else None)


def keep(tokenizer: PreTrainedTokenizerBase, options: DatasetConfig) -> None:
    """Let a tokenizer keep what `dataset` says of texts: the chat template, `wrap` and the special tokens that data may use.

    Raises:
        ConfigError: the template can't be read, or the tokenizer lacks one of the tokens.
    """
    template = ChatTemplate(tokenizer, options.chat_template, allowed=options.special_tokens or ())
    if template.option is not None:
        tokenizer.chat_template = template.option
    before = TextOptions.of(tokenizer)
    settings = {
        "wrap": options.wrap or before.wrap,
        "special_tokens": before.special_tokens if options.special_tokens is None else options.special_tokens,
    }
    said = {name: value for name, value in settings.items() if value is not None}
    if said:
        tokenizer.init_kwargs[KEY] = said
