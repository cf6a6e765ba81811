"""Prompts of requests → token ids, encoded as in the policy's training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_core.data.data_source import ListRows
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.row_source import Cursor
from rlhf_core.data.text_options import TextOptions
from rlhf_core.data.text_spans import TextSpanEncoder
from rlhf_core.infra.errors import DataError

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel


class ReadPrompt(NamedTuple):
    """A prompt as the engine takes it."""

    ids: Sequence[int]
    chat: bool
    """Whether it was encoded with the chat template."""
    text: str
    """For `echo`: as it was sent, or what its ids mean."""


class PromptReader:
    """Reads prompts, and says what token ids mean.

    It has a copy of the policy's tokenizer: another thread decodes with that one.
    """

    def __init__(self, policy: PolicyModel) -> None:
        self._tokenizer: Any = copy.deepcopy(policy.tokenizer)
        self._encoder = Encoder(self._tokenizer, "prompt", max_length=2**31)
        self._pieces = TextSpanEncoder(self._tokenizer)
        self._size = policy.network.config.get_text_config().vocab_size

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> ReadPrompt:
        """Return a chat as the prompt of its next turn.

        Raises:
            DataError: it can't be read, as where it ends on the assistant's turn.
            ModelError: the tokenizer has no chat template.
        """
        return ReadPrompt(self._encoded([dict(message) for message in messages], "messages"), True, "")

    def text(self, text: str) -> ReadPrompt:
        """Return a text as a prompt that is continued, or as a user's turn where the policy was trained so (`wrap: chat`).

        Raises: as `chat`.
        """
        chat = TextOptions.saved_with(self._tokenizer).wrap == "chat"
        return ReadPrompt(self._encoded(text, "prompt"), chat, text)

    def ids(self, ids: Sequence[int]) -> ReadPrompt:
        """Return token ids as a prompt, as they are.

        Raises:
            DataError: there are none, or one isn't in the vocabulary.
        """
        if not ids:
            raise DataError("the prompt is empty", place="prompt")
        if (wrong := next((token for token in ids if not 0 <= token < self._size), None)) is not None:
            raise DataError(f"the model's vocabulary has ids 0 to {self._size - 1}", place="prompt", got=str(wrong))
        return ReadPrompt(ids, False, str(self._tokenizer.decode(ids)))

    def token(self, token: int) -> str:
        """Return the text of one token, with its leading blank; U+FFFD stands for bytes that are no whole character."""
        return self._pieces.text_of([token])

    def _encoded(self, prompt: Any, place: str) -> Sequence[int]:
        (outcome,) = self._encoder.encode(list(ListRows([{"prompt": prompt}], place).rows(Cursor())))
        if outcome.row is None:
            raise DataError(f"the prompt can't be read: {outcome.refused}", place=place)
        return outcome.row.prompt_ids
