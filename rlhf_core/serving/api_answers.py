"""Completions → OpenAI's JSON: whole answers, the chunks of a stream, log-probabilities, usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.contracts.completion import Completion
from rlhf_core.generation.known_tokens import ScoredTokens
from rlhf_core.generation.open_batch import Grown

TextOf = Callable[[int], str]
"""A token's id → its text."""
IMPOSSIBLE = -9999.0
"""Log-probability of a token that the model rules out."""
Top = Sequence[tuple[int, float]]
"""The most likely tokens in one place, most likely first: (id, log-probability in nats)."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Tokens with their log-probabilities under the model's own distribution, nats."""

    ids: Sequence[int] = ()
    logprobs: Sequence[float | None] = ()
    """None for a first token, which nothing predicts."""
    top: Sequence[Top] = ()
    """One entry per token; empty where none is wanted."""

    @classmethod
    def of_drawn(cls, grown: Grown, start: int = 0) -> TokenLogprobs:
        """Return those of a completion's tokens from place `start` on.

        A token that is among the most likely ones has the number that it has there: both were computed apart, and may differ in
        their last bits.
        """
        ids, top = list(grown.completion.ids[start:]), list(grown.top[start:])
        own: list[float | None] = list(grown.completion.raw_logprobs[start:])
        for place, likeliest in enumerate(top):
            own[place] = dict(likeliest).get(ids[place], own[place])
        return cls(ids, own, top)

    @classmethod
    def of_prompt(cls, ids: Sequence[int], scored: ScoredTokens | None) -> TokenLogprobs:
        """Return those of a prompt's tokens, the first one's unknown."""
        if scored is None:
            return cls(ids, [None], [[]])
        likeliest = zip(scored.top.ids.tolist(), scored.top.logprobs.tolist(), strict=True)
        top = [list(zip(*each, strict=True)) for each in likeliest]
        return cls(ids, [None, *scored.logprobs.tolist()], [[], *top])

    def followed_by(self, other: TokenLogprobs) -> TokenLogprobs:
        return TokenLogprobs([*self.ids, *other.ids], [*self.logprobs, *other.logprobs], [*self.top, *other.top])

    def for_chat(self, text_of: TextOf, count: int) -> dict[str, Any]:
        """Return `logprobs` of a chat completion, with `count` of the most likely tokens in each place."""
        top = self.top or [()] * len(self.ids)
        content = [
            {
                **_chat_token(token, logprob, text_of),
                "top_logprobs": [_chat_token(*one, text_of) for one in each[:count]],
            }
            for token, logprob, each in zip(self.ids, self.logprobs, top, strict=True)
        ]
        return {"content": content, "refusal": None}

    def for_text(self, text_of: TextOf, count: int, offset: int) -> dict[str, Any]:
        """Return `logprobs` of a text completion, whose first token begins at place `offset` of the text."""
        tokens = [text_of(token) for token in self.ids]
        offsets, at = [], offset
        for text in tokens:
            offsets.append(at)
            at += len(text)
        top: list[dict[str, float] | None] = []
        for logprob, each in zip(self.logprobs, self.top or [()] * len(self.ids), strict=True):
            named: dict[str, float] = {}
            for token, value in each[:count]:
                named.setdefault(text_of(token), _number(value))  # of several tokens with one text the most likely one
            top.append(None if logprob is None else named)
        return {
            "tokens": tokens,
            "token_logprobs": [None if one is None else _number(one) for one in self.logprobs],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def _chat_token(token: int, logprob: float | None, text_of: TextOf) -> dict[str, Any]:
    text = text_of(token)
    # What isn't a whole character shows as U+FFFD, and its bytes aren't known.
    return {"token": text, "logprob": _number(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def _number(logprob: float | None) -> float:
    """Return a log-probability as JSON has it: OpenAI's -9999 for a token that can't come."""
    return max(logprob or 0.0, IMPOSSIBLE)


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int
    """Of all its prompts, each once."""
    drawn: int = 0

    def as_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.drawn,
            "total_tokens": self.prompt + self.drawn,
        }


@dataclass(frozen=True)
class AnswerFrame:
    """The frame of an answer, or of each chunk of a stream."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Usage) -> dict[str, Any]:
        """Return the answer's JSON value."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._frame(kind), "choices": list(choices), "usage": usage.as_json()}

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        """Return a chunk's JSON value."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._frame(kind), "choices": list(choices)} | ({} if usage is None else {"usage": usage.as_json()})

    def choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        logprobs: Mapping[str, Any] | None,
        *,
        streamed: bool = False,
    ) -> dict[str, Any]:
        """Return a choice, or the part of one that a chunk holds."""
        said: dict[str, Any] = {"text": text}
        if self.chat and streamed:
            said = {"delta": {"content": text}}
        elif self.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> dict[str, Any]:
        """Return the first choice of a streamed chat, which names the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _frame(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def finish_reason(completion: Completion) -> str:
    """Return OpenAI's word for why a completion ended."""
    return "length" if completion.truncated else "stop"
