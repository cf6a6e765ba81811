"""Options for encoding text, saved with the tokenizer, so that whoever loads a model encodes prompts as in its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.data.chat_rendering import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.config.training import DatasetConfig

KEY = "rlhf_core"
"""Key of these options in tokenizer_config.json."""


@dataclass(frozen=True)
class TextOptions:
    """The options with which a model was trained; None where they aren't known."""

    wrap: Literal["none", "chat"] | None = None
    special_tokens: Sequence[str] | None = None

    @classmethod
    def saved_with(cls, tokenizer: PreTrainedTokenizerBase) -> TextOptions:
        """Return the options that are saved with a tokenizer. Values of the wrong type there are ignored."""
        kept: Any = tokenizer.init_kwargs.get(KEY)
        if not isinstance(kept, dict):
            return cls()
        wrap, tokens = kept.get("wrap"), kept.get("special_tokens")
        names = isinstance(tokens, list) and all(isinstance(name, str) for name in tokens)
        return cls(wrap if wrap in ("none", "chat") else None, tokens if names else None)


def save_text_options(tokenizer: PreTrainedTokenizerBase, options: DatasetConfig) -> None:
    """Save the chat template, `wrap` and the control tokens that data may use with a tokenizer, in place.

    Raises:
        ConfigError: the template can't be read, or the tokenizer lacks one of the tokens.
    """
    template = ChatTemplate(tokenizer, options.chat_template, allowed=options.special_tokens or ())
    if template.option is not None:
        tokenizer.chat_template = template.option
    before = TextOptions.saved_with(tokenizer)
    given = {
        "wrap": options.wrap or before.wrap,
        "special_tokens": before.special_tokens if options.special_tokens is None else options.special_tokens,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen:
        tokenizer.init_kwargs[KEY] = chosen
