"""Sampling of each next token inside transformers' decoding loop: temperature, truncation, random numbers, log-probabilities.

All of it happens in one logits processor, which then leaves the loop no choice but the token that was drawn. So no logits are
kept, and a completion's random numbers are a function of its seed and a token's position alone.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.stop_strings import StopStrings

BLOCK = 256
"""Random numbers that are made at once per row."""
SPAN = 128
"""Tokens per span: probabilities are summed within spans of the vocabulary first, then over spans."""
HEAD = 1024
"""Most likely tokens that are sorted first for top-p; the whole vocabulary is sorted only where their mass isn't enough."""


@dataclass(frozen=True)
class Drawn:
    """One token per row."""

    tokens: Tensor
    """(B,) long."""
    logprobs: Tensor
    """(B,) float32, nats, under the distribution that the token was drawn from: after temperature and truncation."""
    raw_logprobs: Tensor
    """(B,) float32, nats, under softmax(logits)."""
    kept_mass: Tensor
    """(B,) float32, the probability under softmax(logits / temperature) of all tokens that truncation kept."""


def draw_tokens(
    logits: Tensor,
    uniform: Tensor,
    sampling: SamplingConfig,
    *,
    seen: Tensor | None = None,
    barred: Tensor | None = None,
) -> Drawn:
    """Draw one token per row by inverting the cumulative distribution, in the vocabulary's order.

    In an order by likelihood, two tokens of almost equal likelihood that rounding swaps would move all tokens between them.

    Args:
        logits: (B, V) float32.
        uniform: (B,) random numbers in [0, 1); ignored at temperature 0.
        sampling: repetition penalty, temperature, top-k, top-p and min-p.
        seen: (B, S) ids that the repetition penalty is for; repeated ids count once.
        barred: (B, V) bool, the tokens that may not be drawn: what the others keep of the probability is in the kept mass.
    """
    # The largest logit is subtracted first: a low temperature would make it infinite.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    scores = logits
    if seen is not None and sampling.repetition_penalty != 1:
        of_seen = logits.gather(1, seen)
        factor = sampling.repetition_penalty
        scores = logits.scatter(1, seen, torch.where(of_seen < 0, of_seen * factor, of_seen / factor))
    if sampling.temperature == 0:
        tokens = (scores if barred is None else scores.masked_fill(barred, -torch.inf)).argmax(dim=-1)
        certain = torch.zeros(len(tokens), device=logits.device)
        return Drawn(tokens, certain, _at(_distribution(shifted)[1], tokens), certain + 1)
    divisor = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    adjusted = scores - scores.amax(dim=-1, keepdim=True)
    weights, logps = _distribution(adjusted / divisor)
    keep = kept(logps, sampling.top_k, sampling.top_p, sampling.min_p, barred)
    if keep is not None:
        weights = weights.where(keep, 0)
    tokens, mass = invert_cumulative(weights, uniform)
    logprobs = _at(logps, tokens)
    raw = logprobs if divisor == 1 and scores is logits else _at(_distribution(shifted)[1], tokens)
    if keep is None:
        return Drawn(tokens, logprobs, raw, torch.ones_like(logprobs))
    mass = mass.clamp(max=1)
    return Drawn(tokens, (logprobs - mass.log()).clamp(max=0).float(), raw, mass.float())


def kept(logps: Tensor, top_k: int, top_p: float, min_p: float = 0.0, barred: Tensor | None = None) -> Tensor | None:
    """Return (B, V) bool: which tokens truncation keeps; None where it keeps all.

    Barred tokens aren't kept. Of the others, top-k keeps the k most likely; top-p keeps of these the fewest, most likely first,
    whose share of their total probability reaches p; min-p keeps of these the ones that are at least `min_p` times as likely as
    the most likely one. Of equally likely tokens those with the lower ids are kept.

    Args:
        logps: (B, V) log-probabilities.
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
        barred: (B, V) bool.
    """
    if barred is not None:
        logps = logps.masked_fill(barred, -torch.inf).log_softmax(dim=-1)
    keep = _most_likely(logps, top_k, top_p)
    if min_p > 0:
        likely = logps >= logps.amax(dim=-1, keepdim=True) + math.log(min_p)
        keep = likely if keep is None else keep & likely
    if barred is not None:
        keep = ~barred if keep is None else keep & ~barred
    return keep


def _most_likely(logps: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Return (B, V) bool: which tokens top-k and top-p keep; None where they keep all. See `kept`."""
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
    """Return (B, 1) how many of the first tokens reach top-p, and (B,) the total probability of all that are given.

    Args:
        logps: (B, k) log-probabilities of the most likely tokens, falling.
        whole: whether probabilities count as they are; else relative to the total of these tokens.
    """
    mass = logps.exp().cumsum(dim=-1, dtype=_exact(logps.device))
    reached = mass if whole else mass / mass[:, -1:]
    count = logps.shape[1] if top_p == 1 else (reached < top_p).sum(dim=-1, keepdim=True) + 1
    return torch.zeros_like(mass[:, :1], dtype=torch.long).add(count).clamp(max=logps.shape[1]), mass[:, -1]


def _distribution(shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities and log-probabilities (B, V) for logits whose largest is 0 in each row."""
    weights = shifted.softmax(dim=-1)
    return weights, shifted + weights.amax(dim=-1, keepdim=True).log()


def invert_cumulative(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) the first tokens whose cumulative weight exceeds `uniform` times the sum of weights, and (B,) the sums.

    In two levels, over spans of the vocabulary and within one span: a cumulative sum over all of it is slow, most so in float64.

    Args:
        weights: (B, V), at least 0, not all 0. uniform: (B,) in [0, 1).
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
    """Return the target, or the next number below `mass` where rounding made the target equal to it: no token would be found."""
    return target.minimum(torch.nextafter(mass, torch.zeros_like(mass)))


def _exact(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype that a device can sum in."""
    return torch.float32 if device.type == "mps" else torch.float64


def _at(logps: Tensor, tokens: Tensor) -> Tensor:
    """Return (B,) the entry of each row of `logps` (B, V) at its token (B,)."""
    return logps.gather(1, tokens[:, None])[:, 0]


class DrawnCompletion(NamedTuple):
    """The tokens drawn for one row, each with the values of `Drawn`."""

    ids: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    kept_mass: list[float]


class Drawing(LogitsProcessor):
    """Draws the next token of each row of a batch at every step of the decoding loop, and keeps what it drew.

    Args:
        sampling: how tokens are drawn.
        seeds: one per row; a row's random numbers are a function of its seed and the token's position alone.
        prompts: each row's prompt ids, for the repetition penalty.
        limits: most tokens of each row.
        ends: for each row, the ids that end it.
        stops: for each row, the stop strings that end it; None where there are none.
        filler: id that an ended row gets while others continue.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ends: Sequence[Sequence[int]],
        stops: Sequence[StopStrings] | None = None,
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
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            width = max(map(len, prompts))
            padded = [[*ids, *[ids[0]] * (width - len(ids))] for ids in prompts]
            self._seen = torch.tensor(padded, device=device)
        self.ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        """(B,) bool: which rows have their last token."""
        self.stopped: dict[int, str] = {}
        """Row → its text before the stop string that ended it."""
        self._stops, self._ids = stops, [list[int]() for _ in seeds]
        self._steps: list[Drawn] = []
        self._alive: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draw one token per row from the logits (B, V) of a step; return scores (B, V) that are -inf at all other tokens."""
        step = len(self._steps)
        if step % BLOCK == 0 and self.sampling.temperature > 0:
            block = np.stack([generator.random(BLOCK) for generator in self._generators])
            self._uniform = torch.from_numpy(block).to(_exact(self.device)).to(self.device)
        uniform = self._uniform[:, step % BLOCK] if self.sampling.temperature > 0 else self._uniform
        barred = None
        if step < self.sampling.min_new_tokens and len(self._known):
            barred = torch.zeros_like(scores, dtype=torch.bool)
            barred[:, self._known] = self._may_end
        drawn = draw_tokens(scores, uniform, self.sampling, seen=self._seen, barred=barred)
        self._steps.append(drawn)
        self._alive.append(~self.ended)
        if self._seen is not None:
            self._seen = torch.cat([self._seen, drawn.tokens[:, None]], dim=1)
        tokens = drawn.tokens.where(~self.ended, self.filler)
        last = ((drawn.tokens[:, None] == self._known) & self._may_end).any(dim=1) | (step + 1 >= self._limits)
        if self._stops is not None:
            last = last | self._stop(drawn.tokens.tolist(), self.ended.tolist())
        self.ended = self.ended | last
        return scores.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)  # a copy that the loop made for this

    def _stop(self, tokens: list[int], ended: list[bool]) -> Tensor:
        """Return (B,) bool: in which rows the step's token completed a stop string."""
        for row, (token, over) in enumerate(zip(tokens, ended, strict=True)):
            if not over and self._stops is not None:
                self._ids[row].append(token)
                text = self._stops[row].text_before(self._ids[row], least=self.sampling.min_new_tokens)
                if text is not None:
                    self.stopped[row] = text
        return torch.tensor([row in self.stopped for row in range(len(tokens))], device=self.device)

    def completions(self) -> list[DrawnCompletion]:
        """Return what was drawn for each row, up to its last token."""

        def per_row(name: str) -> list[list[Any]]:
            return torch.stack([getattr(step, name) for step in self._steps], dim=1).tolist()

        lengths = torch.stack(self._alive).sum(dim=0).tolist()
        columns = [per_row(name) for name in ("tokens", "logprobs", "raw_logprobs", "kept_mass")]
        return [
            DrawnCompletion(*(values[:length] for values in row))
            for length, *row in zip(lengths, *columns, strict=True)
        ]


class Ended(StoppingCriteria):
    """Ends the decoding loop once each row has its last token."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.drawing.ended
