"""What generation returns for a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TRUNCATED = ("length", "confidence")
"""The stop reasons of completions that were cut off, though the policy hadn't ended them."""


@dataclass(frozen=True)
class Completion:
    """A sampled response with the probabilities under which it was drawn, and why it stopped. Axis: T, its tokens."""

    text: str
    ids: Sequence[int]
    logprobs: Sequence[float]
    """(T,) log-probability of each token under the distribution that drew it (temperature and truncation included), nats."""
    stop_reason: str
    """`end` after the end token, which is the last of `ids`; `stop` after a stop string or stop id, which `ids` hold and `text`
    is without; `rule` where a stopping rule ended it; `confidence` where the policy's confidence was below `min_confidence`;
    `length` where the limit cut it off."""
    raw_logprobs: Sequence[float] = ()
    """(T,) log-probability of each token under the model's own distribution (temperature 1, nothing truncated), nats."""
    kept_mass: Sequence[float] = ()
    """(T,) share of the tempered distribution that truncation (top-k, top-p, min-p, ends barred by `min_new_tokens`) kept where
    each token was drawn, at most 1."""
    confidence: Sequence[float] = ()
    """(T,) token confidence where each token was drawn, nats: see `token_confidence`; empty without `min_confidence`."""
    mask: Sequence[bool] | None = None
    """(T,) whether the policy wrote each token (a tool's output isn't its own); None where it wrote them all."""
    score: float | None = None
    policy_version: int = 0
    """Optimiser steps that the policy had made when it wrote this."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a sampler reports about its choice or search, as JSON values, such as votes: the column `details` of `rlhf sample`."""

    @property
    def truncated(self) -> bool:
        """Whether it was cut off: by the limit, or for too little confidence."""
        return self.stop_reason in TRUNCATED
