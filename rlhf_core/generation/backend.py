"""The seam between the engine and what draws tokens for it, so that another program can take the place of the native loops.

The engine knows prompts, seeds, texts and what ends a completion. A backend gets token ids and returns token ids, and declares
what it can do; the engine refuses, with a message that names the backend, whatever needs more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.requests import Finished, Request
from rlhf_core.infra.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_core.generation.known_tokens import ScoredTokens
    from rlhf_core.generation.paged_cache import CachedSequence

ALWAYS = frozenset({"max_new_tokens", "temperature"})
"""Options of `SamplingConfig` that every backend follows."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do besides drawing completions, each up to its own limit of tokens."""

    live_weights: bool = False
    """It draws with the weights that the policy has at the moment of the call, so nothing need be copied after an update."""
    exact_logprobs: bool = False
    """The log-probabilities and the kept mass of each token are those of the distribution that it was drawn from, in float32."""
    fork: bool = False
    """It keeps what was computed for a sequence, and forks it in constant time: `Backend.prefill` and `Backend.follow`."""
    streaming: bool = False
    """It yields completions after each of their tokens where it is asked to."""
    rules: bool = False
    """It asks `Request.rule` after each token."""
    joining: bool = False
    """Requests join and leave while others are drawn: `Backend.open`."""
    drafts: bool = False
    """`run` takes `drafts`: guesses at next tokens, several of which one pass verifies."""
    options: frozenset[str] = frozenset()
    """The options of `SamplingConfig` that it follows, besides those in `ALWAYS`."""


_WORDS = {
    "live_weights": "draw with the weights that the policy has at the moment",
    "exact_logprobs": "return exact log-probabilities of the tokens drawn",
    "fork": "keep sequences and fork them",
    "streaming": "return completions token by token",
    "rules": "end completions by a rule",
    "joining": "take requests while others are drawn",
    "drafts": "verify drafts",
}
"""Capability → what a backend with it can do, for messages."""


class OpenRun(ABC):
    """A run of a backend that requests join and leave while others are drawn. Not for several threads at once."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many requests haven't got their last token."""

    @abstractmethod
    def join(self, requests: Sequence[Request]) -> None:
        """Take requests, whose numbers no other one has; they are drawn as soon as there is room. None has `base` or `keep`."""

    @abstractmethod
    def leave(self, numbers: Collection[int]) -> None:
        """Give up requests, and free their rows; a number that isn't here is left out. Others draw what they would have drawn."""

    @abstractmethod
    def step(self) -> list[Finished]:
        """Draw a token for each row, or a few; return the completions that ended, and those with `partly` that have grown.

        Returns at once, with nothing, where no request is here.

        Raises:
            ConfigError: the policy's weights have changed since the run was opened.
            NumbersError: memory doesn't suffice for one completion.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up all requests. A run must be closed; closing it twice does nothing."""


class Backend(ABC):
    """Draws tokens behind token ids for an `Engine`."""

    name: ClassVar[str]
    """How messages call it."""
    capabilities: ClassVar[Capabilities]

    @abstractmethod
    def run(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, partly: bool = False
    ) -> Generator[Finished]:
        """Yield completions in the order in which they end.

        A request's seed, limit and ends are its own; stop strings are looked for by `Request.stops`. The generator may be closed
        before its end.

        Args:
            partly: yield each completion after each of its tokens, too, with `UNFINISHED` as its reason. Only with `streaming`.

        Raises:
            NumbersError: memory doesn't suffice for one completion.
        """

    def open(self, sampling: SamplingConfig) -> OpenRun:
        """Begin a run that requests join and leave while others are drawn. Only with `joining`.

        Args:
            sampling: how tokens are drawn, but for what a request has of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} declares `joining` without `open`")

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[CachedSequence | None]:
        """Compute what is kept for prompts: for all their ids but the last. Only with `fork`.

        Returns:
            For each prompt what is kept; None where the backend reads such a prompt again each time.
        """
        raise NotImplementedError(f"{type(self).__name__} declares `fork` without `prefill`")

    def follow(
        self,
        kept: Sequence[CachedSequence | None],
        whole: Sequence[Sequence[int]],
        counts: Sequence[int],
        *,
        temperature: float,
        top: int = 0,
    ) -> list[tuple[CachedSequence | None, ScoredTokens]]:
        """Compute what is kept for sequences with given tokens behind them, and the tokens' log-probabilities. Only with `fork`.

        Args:
            kept: what is kept for each sequence without these tokens; it stays as it is.
            whole: the ids of each sequence, these tokens included.
            counts: how many of its last ids are these tokens, at least 1.
            temperature: the distribution is softmax(logits / temperature).
            top: how many of the most likely tokens in each one's place are wanted, too.

        Returns:
            For each sequence what is kept, and its tokens' scores.
        """
        raise NotImplementedError(f"{type(self).__name__} declares `fork` without `follow`")

    def free(self, kept: Sequence[CachedSequence | None]) -> None:
        """Give up what is kept for sequences, each by itself."""
        for one in kept:
            if one is not None:
                one.free()

    def forget(self) -> None:  # noqa: B027
        """Drop all that is kept between calls, since some of it may be wrong. A backend that keeps nothing does nothing."""

    # What it is refused for

    def require(self, *needed: str, purpose: str) -> None:
        """Refuse a purpose that the backend can't serve.

        Args:
            needed: names of `Capabilities`.
            purpose: for the message: `streaming a completion`.

        Raises:
            ConfigError: it doesn't declare one of them.
        """
        for capability in needed:
            if not getattr(self.capabilities, capability):
                able = [each.name for each in fields(Capabilities) if getattr(self.capabilities, each.name) is True]
                raise ConfigError(
                    f"the generation backend `{self.name}` can't {_WORDS[capability]}", place=purpose,
                    got=f"one that declares {', '.join(able) or 'nothing'}",
                    fix=f"use a backend that declares `{capability}`, as the native one does",
                )  # fmt: skip

    def check_options(self, sampling: SamplingConfig) -> None:
        """Refuse sampling options that the backend would ignore.

        Raises:
            ConfigError: an option has another value than its default, and the backend doesn't declare it.
        """
        followed = ALWAYS | self.capabilities.options
        for option, field in SamplingConfig.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if option not in followed and getattr(sampling, option) != default:
                raise ConfigError(
                    f"the generation backend `{self.name}` doesn't follow this option", place=f"`{option}`",
                    got=repr(getattr(sampling, option)), fix=f"leave it out; it follows {', '.join(sorted(followed))}",
                )  # fmt: skip
