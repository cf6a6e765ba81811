"""The draw of each next token, inside transformers' decoding loop: temperature, truncation, random numbers, log-probabilities.

All of it happens in one logits processor, which then leaves the loop no choice but the token that was drawn. So no scores are
kept, and a completion's random numbers are a function of its seed and a token's position alone. Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from rlhf_core.online import SamplingConfig

BLOCK = 256
"""Random numbers that are made at once for each row."""
HEAD = 1024
"""Most likely tokens that are sorted first for top-p; the whole vocabulary only where their mass doesn't reach it."""


@dataclass(frozen=True)
class Drawn:
    """One token for each row."""

    tokens: Tensor
    """(B,) long."""
    logprobs: Tensor
    """(B,) float32, nats, under the distribution that drew it: tempered, truncated."""
    raw_logprobs: Tensor
    """(B,) float32, nats, under softmax(logits)."""
    kept_mass: Tensor
    """(B,) float32, the mass of softmax(logits / temperature) that truncation kept."""


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> Drawn:
    """Draw a token for each row by the inverse of the cumulative distribution, in the order of the vocabulary.

    In any other order two tokens of almost equal likelihood, swapped by rounding, would move everything between them.

    Args:
        logits: (B, V) float32.
        uniform: (B,) in [0, 1).
    """
    raw = logits.log_softmax(dim=-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
        certain = torch.zeros(len(tokens), device=logits.device)
        return Drawn(tokens, certain, _at(raw, tokens), certain + 1)
    # The largest logit is taken off first: a low temperature would send it to infinity.
    largest = logits.max(dim=-1, keepdim=True).values
    divisor = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    tempered = raw if divisor == 1 else ((logits - largest) / divisor).log_softmax(dim=-1)
    exact = _exact(logits.device)
    weights = tempered.exp()
    keep = kept(tempered, sampling.top_k, sampling.top_p)
    if keep is not None:
        weights = weights.where(keep, 0)
    cumulative = weights.cumsum(dim=-1, dtype=exact)
    mass = cumulative[:, -1:]
    target = uniform.to(exact)[:, None] * mass
    target = target.minimum(torch.nextafter(mass, torch.zeros_like(mass)))  # a product rounded up would find no token
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    logprobs = _at(tempered, tokens)
    if keep is None:
        return Drawn(tokens, logprobs, _at(raw, tokens), torch.ones_like(logprobs))
    mass = mass[:, 0].clamp(max=1)
    return Drawn(tokens, (logprobs - mass.log()).clamp(max=0).float(), _at(raw, tokens), mass.float())


def kept(logps: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Return (B, V) which tokens truncation keeps; None where it keeps all.

    Top-k keeps so many of the most likely tokens, top-p of these the fewest whose mass, relative to theirs, reaches it. Of
    equally likely tokens those with the lower ids stay.

    Args:
        logps: (B, V) log-probabilities.
    """
    size = logps.shape[-1]
    width = min(top_k, size) if top_k else size
    if width == size and top_p == 1:
        return None
    values = logps.topk(width if top_k else min(HEAD, size), dim=-1).values  # falling
    count = torch.full_like(values[:, :1], width, dtype=torch.long)
    if top_p < 1:
        mass = _mass(values)
        if not top_k and values.shape[1] < size and bool((mass[:, -1] < top_p).any()):
            values = logps.sort(dim=-1, descending=True).values
            mass = _mass(values)
        share = mass / mass[:, -1:] if top_k else mass
        count = (share < top_p).sum(dim=-1, keepdim=True).add(1).clamp(max=values.shape[1])
    least = values.gather(1, count - 1)
    above, equal = logps > least, logps == least
    return above | (equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))


def _exact(device: torch.device) -> torch.dtype:
    """Return the widest type that a device sums in."""
    return torch.float32 if device.type == "mps" else torch.float64


def _mass(logps: Tensor) -> Tensor:
    return logps.exp().cumsum(dim=-1, dtype=_exact(logps.device))


def _at(logps: Tensor, tokens: Tensor) -> Tensor:
    return logps.gather(1, tokens[:, None])[:, 0]


class Drawing(LogitsProcessor):
    """Draws for a batch of rows, step by step, and remembers what it drew.

    Args:
        sampling: how.
        seeds: each row's; its random numbers are a function of it and the token's position alone.
        limits: most tokens of each row.
        ends: the ids that end each row.
        filler: the id that a row has behind its end.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int],
        limits: Sequence[int],
        ends: Sequence[Sequence[int]],
        filler: int,
        device: torch.device,
    ) -> None:
        self.sampling, self.filler, self.device = sampling, filler, device
        self._generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        self._limits = torch.tensor(limits, device=device)
        known = sorted({token for ids in ends for token in ids})
        self._known = torch.tensor(known, dtype=torch.long, device=device)  # (S,)
        may_end = [[token in ids for token in known] for ids in ends]
        self._may_end = torch.tensor(may_end, dtype=torch.bool, device=device).view(len(ends), len(known))
        self._uniform = torch.empty(0, device=device)
        self.ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        """(B,) which rows have their last token."""
        self._steps: list[Drawn] = []
        self._alive: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draw from the logits (B, V); return scores whose largest is the drawn token's."""
        step = len(self._steps)
        if step % BLOCK == 0 and self.sampling.temperature > 0:
            block = np.stack([generator.random(BLOCK) for generator in self._generators])
            self._uniform = torch.from_numpy(block).to(_exact(self.device)).to(self.device)
        uniform = self._uniform[:, step % BLOCK] if self.sampling.temperature > 0 else self._uniform
        drawn = draw(scores, uniform, self.sampling)
        self._steps.append(drawn)
        self._alive.append(~self.ended)
        tokens = drawn.tokens.where(~self.ended, self.filler)
        last = ((drawn.tokens[:, None] == self._known) & self._may_end).any(dim=1) | (step + 1 >= self._limits)
        self.ended = self.ended | last
        return scores.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)  # a copy that the loop made for this

    def columns(self) -> tuple[list[int], list[list[int]], list[list[float]], list[list[float]], list[list[float]]]:
        """Return each row's length, and its ids, `logprobs`, `raw_logprobs` and `kept_mass`, with more behind the end."""

        def column(name: str) -> list[list[Any]]:
            return torch.stack([getattr(step, name) for step in self._steps], dim=1).tolist()

        lengths = torch.stack(self._alive).sum(dim=0).tolist()
        return lengths, column("tokens"), column("logprobs"), column("raw_logprobs"), column("kept_mass")


class Ended(StoppingCriteria):
    """Ends the decoding loop once each row has its last token."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.drawing.ended
