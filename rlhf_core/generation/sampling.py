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

from rlhf_core.config.online import SamplingConfig

BLOCK = 256
"""Random numbers that are made at once for each row."""
SPAN = 128
"""Tokens whose weights are summed before the sums are."""
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
    # The largest logit is taken off first: a low temperature would send it to infinity.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
        certain = torch.zeros(len(tokens), device=logits.device)
        return Drawn(tokens, certain, _at(_distribution(shifted)[1], tokens), certain + 1)
    divisor = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    weights, logps = _distribution(shifted / divisor)
    keep = kept(logps, sampling.top_k, sampling.top_p)
    if keep is not None:
        weights = weights.where(keep, 0)
    tokens, mass = _inverse(weights, uniform)
    logprobs = _at(logps, tokens)
    raw = logprobs if divisor == 1 else _at(_distribution(shifted)[1], tokens)
    if keep is None:
        return Drawn(tokens, logprobs, raw, torch.ones_like(logprobs))
    mass = mass.clamp(max=1)
    return Drawn(tokens, (logprobs - mass.log()).clamp(max=0).float(), raw, mass.float())


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
    count, share = _fewest(values, top_p, whole=not top_k)
    least = values.gather(1, count - 1)
    if not top_k and values.shape[1] < size and bool((short := share < top_p).any()):
        values = logps[short].sort(dim=-1, descending=True).values
        count[short] = _fewest(values, top_p, whole=True)[0]
        least[short] = values.gather(1, count[short] - 1)
    keep = logps >= least
    if bool((keep.sum(dim=-1, keepdim=True) > count).any()):
        above, equal = logps > least, logps == least
        keep = above | (equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
    return keep


def _fewest(logps: Tensor, top_p: float, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Return (B, 1) how many of the most likely tokens, in falling order, reach a mass, and (B,) the mass of all.

    Args:
        whole: whether the mass is that of the whole distribution, and not relative to these tokens'.
    """
    mass = logps.exp().cumsum(dim=-1, dtype=_exact(logps.device))
    reached = mass if whole else mass / mass[:, -1:]
    count = logps.shape[1] if top_p == 1 else (reached < top_p).sum(dim=-1, keepdim=True) + 1
    return torch.zeros_like(mass[:, :1], dtype=torch.long).add(count).clamp(max=logps.shape[1]), mass[:, -1]


def _distribution(shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities and their logarithms (B, V) for logits whose largest is 0: its probability is one over the sum."""
    weights = shifted.softmax(dim=-1)
    return weights, shifted + weights.amax(dim=-1, keepdim=True).log()


def _inverse(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) the tokens where cumulative weights exceed `uniform` of their sum, and (B,) the sums.

    In two levels, over spans of the vocabulary and within one: a sum along all of it is slow, most of all in float64.
    """
    exact, size = _exact(weights.device), weights.shape[-1]
    body = size // SPAN * SPAN
    spans = [weights[:, :body].unflatten(1, (-1, SPAN)).sum(dim=-1), weights[:, body:].sum(dim=-1, keepdim=True)]
    ends = torch.cat(spans, dim=1).cumsum(dim=-1, dtype=exact)
    mass = ends[:, -1:]
    target = _below(uniform.to(exact)[:, None] * mass, mass)
    span = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    begin = torch.where(span > 0, ends.gather(1, (span - 1).clamp(min=0)), 0)
    places = span * SPAN + torch.arange(SPAN, device=weights.device)  # (B, SPAN)
    within = weights.gather(1, places.clamp(max=size - 1)).where(places < size, 0).cumsum(dim=-1, dtype=exact)
    found = torch.searchsorted(within, _below(target - begin, within[:, -1:]), right=True)
    return (span * SPAN + found)[:, 0].clamp(max=size - 1), mass[:, 0]


def _below(target: Tensor, mass: Tensor) -> Tensor:
    """Return a target below the mass: one that was rounded up to it would find no token."""
    return target.minimum(torch.nextafter(mass, torch.zeros_like(mass)))


def _exact(device: torch.device) -> torch.dtype:
    """Return the widest type that a device sums in."""
    return torch.float32 if device.type == "mps" else torch.float64


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
