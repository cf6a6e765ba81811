"""The draw of each next token from its logits: penalty, temperature, truncation, and the log-probabilities of what was drawn.

Axes: R rows, V vocabulary, S ids that the repetition penalty is for, E ids that end some row, H most likely tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_core.config.online import SamplingConfig

SPAN = 128
"""Tokens per span: probabilities are summed within spans of the vocabulary first, then over spans."""
HEAD = 4096
"""Most likely tokens that are sorted first on a CPU for top-p; all are sorted only in the rows where these aren't enough."""
ENTRIES = 2**20
"""Entries of (R, V) that are worked on at once on a CPU; larger takes more memory, and leaves the processor's cache."""


class Drawn(NamedTuple):
    """One token per row."""

    tokens: Tensor
    """(R,) long."""
    logprobs: Tensor
    """(R,) float32, nats, under the distribution that the token was drawn from: after penalty, temperature and truncation."""
    raw_logprobs: Tensor
    """(R,) float32, nats, under softmax(logits)."""
    kept_mass: Tensor
    """(R,) float32, the probability, after penalty and temperature, of all tokens that could be drawn: truncation kept them,
    and they weren't barred."""


class TopTokens(NamedTuple):
    """The most likely tokens of each row, most likely first. Axes: R rows, K tokens."""

    ids: Tensor
    """(R, K) long."""
    logprobs: Tensor
    """(R, K) float32, nats."""


class Barred(NamedTuple):
    """Tokens that may not be drawn."""

    ids: Tensor
    """(E,) long, each once."""
    rows: Tensor
    """(R, E) bool: in which rows each id is barred."""


@torch.no_grad()
def draw_tokens(
    logits: Tensor,
    uniform: Tensor,
    sampling: SamplingConfig,
    *,
    seen: Tensor | None = None,
    barred: Barred | None = None,
    work: Tensor | None = None,
) -> Drawn:
    """Draw one token per row by inverting the cumulative distribution, in the vocabulary's order.

    In an order by likelihood, two tokens of almost equal likelihood that rounding swaps would move all tokens between them.
    On a GPU nothing waits for the device, and all shapes follow from those of the arguments.

    Args:
        logits: (R, V), any floating dtype; they aren't changed.
        uniform: (R,) random numbers in [0, 1); ignored at temperature 0.
        sampling: repetition penalty, temperature, top-k, top-p and min-p, applied in this order.
        seen: (R, S) ids that the repetition penalty is for; repeated ids count once.
        barred: tokens that may not be drawn.
        work: memory to work in, from `workspace`; None allocates it.
    """
    if sampling.repetition_penalty == 1:
        seen = None
    work = workspace(logits) if work is None else work
    parts = []
    for start in range(0, max(len(logits), 1), work.shape[1]):
        part = slice(start, start + work.shape[1])
        part_seen = None if seen is None else seen[part]
        part_barred = None if barred is None else Barred(barred.ids, barred.rows[part])
        memory = work[:, : len(logits[part])]
        parts.append(_draw(logits[part], uniform[part], sampling, part_seen, part_barred, *memory))
    return parts[0] if len(parts) == 1 else Drawn(*(torch.cat(values) for values in zip(*parts, strict=True)))


def workspace(logits: Tensor) -> Tensor:
    """Return memory for `draw_tokens` on logits (R, V), (2, rows at once, V) float32.

    A loop keeps it: on a CPU, memory that is allocated at each step costs as much time as the work that is done in it.
    """
    rows, size = logits.shape
    at_once = min(rows, ENTRIES // size) if logits.device.type == "cpu" else rows
    return torch.empty(2, max(at_once, 1), size, device=logits.device)


def _draw(
    logits: Tensor,
    uniform: Tensor,
    sampling: SamplingConfig,
    seen: Tensor | None,
    barred: Barred | None,
    work: Tensor,
    scratch: Tensor,
) -> Drawn:
    """Draw one token per row; see `draw_tokens`. `work` and `scratch` are memory, (R, V) float32."""
    temperature, penalty = sampling.temperature, sampling.repetition_penalty
    divisor = max(temperature, torch.finfo(torch.float32).tiny)
    adjusted = seen is not None or barred is not None
    copied = adjusted or temperature not in (0, 1) or logits.dtype != torch.float32
    scores = work.copy_(logits) if copied else logits
    largest = raw_total = scores.amax(dim=-1, keepdim=True)
    own = temperature == 1 and not adjusted  # whether the distribution that is drawn from is the model's own
    if not own:
        raw_total = _log_total(scores, largest, scratch)
    if seen is not None:
        scores.scatter_(1, seen, penalised(scores.gather(1, seen), penalty))
    barred_scores = None if barred is None else _bar(scores, barred)
    if adjusted:
        largest = scores.amax(dim=-1, keepdim=True)
    if temperature == 0:
        tokens = most_likely(scores)
        certain = torch.zeros(len(tokens), device=logits.device)
        return Drawn(tokens, certain, (_at(logits, tokens) - raw_total)[:, 0].float(), certain + 1)
    if temperature != 1:
        # The largest is subtracted first: a low temperature would make it infinite.
        scores.sub_(largest).div_(divisor)
    weights = torch.softmax(scores, dim=-1, out=work)
    top = weights.amax(dim=-1, keepdim=True)  # exp(0) / the rounded sum by which softmax divided
    total = _span_ends(weights)[:, -1:] if _truncates(sampling, weights.shape[1]) else None
    if total is not None:
        _truncate(weights, top, sampling, scratch)
    tokens, mass = invert_cumulative(weights, uniform)
    mass = mass[:, None]
    total = mass if total is None else total
    logit = score = _at(logits, tokens)
    if seen is not None:
        repeated = (seen == tokens[:, None]).any(dim=1, keepdim=True)
        score = torch.where(repeated, penalised(logit, penalty), logit)
    whole = (score - largest) / divisor + (top.log() - total.log())  # before truncation
    raw = whole if own else logit - raw_total
    mass = (mass / total).clamp(max=1)
    logprobs = (whole - mass.log()).clamp(max=0).float()
    if barred_scores is not None:
        exact = exact_dtype(logits.device)
        odds = (((barred_scores - largest) / divisor).to(exact).exp() * (top / total)).sum(dim=-1, keepdim=True)
        mass = (mass / (1 + odds)).clamp(min=torch.finfo(torch.float32).tiny)
    return Drawn(tokens, logprobs[:, 0], raw[:, 0].float(), mass[:, 0].float())


def penalised(scores: Tensor, penalty: float) -> Tensor:
    """Return scores of repeated tokens after the repetition penalty: positive ones divided by it, negative ones multiplied."""
    return torch.where(scores < 0, scores * penalty, scores / penalty)


def _bar(scores: Tensor, barred: Barred) -> Tensor:
    """Set the scores (R, V) of barred tokens to -inf; return (R, E) what they were, -inf where an id isn't barred."""
    before = scores[:, barred.ids]
    scores[:, barred.ids] = before.masked_fill(barred.rows, -torch.inf)
    return before.masked_fill(~barred.rows, -torch.inf)


def top_tokens(logprobs: Tensor, k: int) -> TopTokens:
    """Return the k most likely tokens of log-probabilities (R, V); a smaller vocabulary counts whole."""
    values, ids = logprobs.topk(min(k, logprobs.shape[1]), dim=-1)
    return TopTokens(ids, values)


@torch.no_grad()
def token_confidence(logits: Tensor, k: int) -> Tensor:
    """Return the token confidence -(1 / k) Σ log p(j) over the k most likely tokens of softmax(logits), (R,) float32, nats.

    Large where the model is sure: then all but one of the k are unlikely. At least log k. Fu et al. 2025, "Deep Think with
    Confidence", arXiv 2508.15260, section 2. Unlike there, a probability below the smallest normal float32 number counts as that,
    so that a model which rules tokens out has a finite confidence.

    Args:
        logits: (R, V), any floating dtype. k: a smaller vocabulary counts whole.
    """
    scores = logits.float()
    top = scores.topk(min(k, scores.shape[1]), dim=-1).values
    total = _log_total(scores, top[:, :1], torch.empty_like(scores))
    surprisal = (total - top).clamp(max=-math.log(torch.finfo(torch.float32).tiny))  # NaN stays
    return surprisal.mean(dim=-1).float()


# Truncation


def _truncates(sampling: SamplingConfig, size: int) -> bool:
    """Tell whether top-k, top-p or min-p may drop tokens of a vocabulary of a size."""
    return 0 < sampling.top_k < size or sampling.top_p < 1 or sampling.min_p > 0


def _truncate(weights: Tensor, top: Tensor, sampling: SamplingConfig, scratch: Tensor) -> None:
    """Set the probabilities (R, V) that top-k, top-p and min-p drop to 0.

    Top-k keeps the k most likely tokens and those as likely as the last of them; top-p keeps of these the fewest, most likely
    first, whose share of their total probability reaches p; min-p keeps of these the ones that are at least `min_p` times as
    likely as the most likely one. Where top-p keeps some of equally likely tokens, it keeps those with the higher ids: as
    transformers does all this.

    Args:
        weights: (R, V) probabilities. top: (R, 1) the largest of each row. scratch: (R, V) memory.
    """
    top_k = sampling.top_k if sampling.top_k < weights.shape[1] else 0
    least, surplus = top * sampling.min_p, None
    if top_k or sampling.top_p < 1:
        kept, surplus = _least_kept(weights, top_k, sampling.top_p, scratch)
        surplus = surplus.where(kept >= least, 0)
        least = least.maximum(kept)
    weights.mul_(torch.ge(weights, least, out=scratch))
    if surplus is not None and sampling.top_p < 1:
        _drop_first(weights, least, surplus, scratch)


def _least_kept(weights: Tensor, top_k: int, top_p: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Return (R, 1) the least probability that top-k and top-p keep, and (R, 1) how many too many tokens are as likely.

    Args:
        weights: (R, V) probabilities. top_k: 0 keeps all. top_p: 1 keeps all. scratch: (R, V) memory.
    """
    size = weights.shape[1]
    head = min(size, top_k + HEAD) if weights.device.type == "cpu" else size
    least, surplus, unsettled = _least_of(_falling(weights, head, scratch), top_k, top_p)
    if head < size and bool(unsettled.any()):
        rows = unsettled[:, 0].nonzero()[:, 0]
        least[rows], surplus[rows], _ = _least_of(_falling(weights[rows], size, scratch[: len(rows)]), top_k, top_p)
    return least, surplus


def _least_of(values: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_least_kept` does, and (R, 1) whether tokens beyond the given ones may change it.

    Args:
        values: (R, H) the largest probabilities, falling.
    """
    tied = torch.zeros_like(values[:, :1], dtype=torch.bool)
    if top_k:
        tied = values[:, -1:] >= values[:, top_k - 1 : top_k]  # then others may be as likely, and count in the total
        values = values.where(values >= values[:, top_k - 1 : top_k], 0)
    ends = _span_ends(values)
    count = torch.full_like(ends[:, :1], top_k or values.shape[1], dtype=torch.long)
    short = torch.zeros_like(count, dtype=torch.bool)
    if top_p < 1:
        target = top_p * ends[:, -1:] if top_k else torch.full_like(ends[:, :1], top_p)
        short = ends[:, -1:] < target
        count = _first_reaching(values, ends, target, beyond=False).clamp(max=values.shape[1] - 1) + 1
    least = values.gather(1, count - 1)
    equal_or_more = torch.searchsorted(-values, -least, right=True)
    return least, equal_or_more - count, tied | short | (equal_or_more == values.shape[1])


def _falling(weights: Tensor, most: int, scratch: Tensor) -> Tensor:
    """Return (R, most) the largest of the weights (R, V), falling. On a CPU numpy sorts values alone, many times faster."""
    if weights.device.type != "cpu":
        return weights.sort(dim=-1, descending=True).values[:, :most]
    values = torch.neg(weights, out=scratch).numpy()
    if most < values.shape[1]:
        values.partition(most - 1, axis=-1)
        values = values[:, :most].copy()
    values.sort(axis=-1)
    return torch.from_numpy(values).neg_()


def _drop_first(weights: Tensor, least: Tensor, surplus: Tensor, scratch: Tensor) -> None:
    """Set the first `surplus` (R, 1) of the entries of each row of `weights` (R, V) that equal `least` (R, 1) to 0."""
    if weights.device.type != "cpu":
        equal = weights == least
        weights.masked_fill_(equal & (equal.cumsum(dim=-1) <= surplus), 0)
    elif bool((surplus > 0).any()):
        equal = scratch.view(-1).view(torch.bool)[: weights.numel()].view(weights.shape)
        np.equal(weights.numpy(), least.where(surplus > 0, -1).numpy(), out=equal.numpy())
        flat = np.flatnonzero(equal.numpy())
        rows = flat // weights.shape[1]
        place = np.arange(len(flat)) - np.searchsorted(rows, rows)
        weights.view(-1)[torch.from_numpy(flat[place < surplus.numpy()[rows, 0]])] = 0


# Sums over the vocabulary


def invert_cumulative(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return (R,) the first tokens whose cumulative weight exceeds `uniform` times the sum of weights, and (R,) the sums.

    In two levels, over spans of the vocabulary and within one span: a cumulative sum over all of it is slow, most so in float64.

    Args:
        weights: (R, V), at least 0, not all 0. uniform: (R,) in [0, 1).
    """
    ends = _span_ends(weights)
    mass = ends[:, -1:]
    target = _below(uniform.to(ends.dtype)[:, None] * mass, mass)
    return _first_reaching(weights, ends, target, beyond=True)[:, 0].clamp(max=weights.shape[1] - 1), mass[:, 0]


def _log_total(scores: Tensor, largest: Tensor, scratch: Tensor) -> Tensor:
    """Return (R, 1) the logarithm of the sum of exp(scores).

    The sum by which PyTorch's softmax divides is off by 1e-5 of it for 50,000 tokens; the sum of what it gives shows by how much.

    Args:
        scores: (R, V). largest: (R, 1) of each row. scratch: (R, V) memory.
    """
    weights = torch.softmax(scores, dim=-1, out=scratch)
    return largest + (_span_ends(weights)[:, -1:].log() - weights.amax(dim=-1, keepdim=True).log())


def _span_ends(weights: Tensor) -> Tensor:
    """Return (R, V / SPAN) the cumulative weights at the end of each span, the last of which may be shorter."""
    body, tail = _spans(weights)
    spans = torch.cat([body.sum(dim=-1), tail.sum(dim=-1, keepdim=True)], dim=1)
    return spans.cumsum(dim=-1, dtype=exact_dtype(weights.device))


def _first_reaching(weights: Tensor, ends: Tensor, target: Tensor, *, beyond: bool) -> Tensor:
    """Return (R, 1) the first tokens whose cumulative weight reaches the target (R, 1), or exceeds it where `beyond`.

    Args:
        weights: (R, V), at least 0. ends: see `_span_ends`.
    """
    span = torch.searchsorted(ends, target, right=beyond).clamp(max=ends.shape[1] - 1)
    begin = torch.where(span > 0, ends.gather(1, (span - 1).clamp(min=0)), 0)
    within = _span(weights, span, 0).cumsum(dim=-1, dtype=ends.dtype)
    return span * SPAN + torch.searchsorted(within, _below(target - begin, within[:, -1:]), right=beyond)


def most_likely(scores: Tensor) -> Tensor:
    """Return (R,) the tokens of the largest scores (R, V), the first of equal ones. In two levels, which is faster on a CPU."""
    body, tail = _spans(scores)
    tail = tail.amax(dim=-1, keepdim=True) if tail.shape[1] else scores[:, :0]
    span = torch.cat([body.amax(dim=-1), tail], dim=1).argmax(dim=-1, keepdim=True)
    return (span * SPAN)[:, 0] + _span(scores, span, -torch.inf).argmax(dim=-1)


def _spans(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of (R, V) values: whole spans (R, V // SPAN, SPAN), and what is left (R, V % SPAN)."""
    count = values.shape[1] // SPAN
    return values[:, : count * SPAN].unflatten(1, (count, SPAN)), values[:, count * SPAN :]


def _span(values: Tensor, span: Tensor, filler: float) -> Tensor:
    """Return (R, SPAN) the values in the span (R, 1) of each row of (R, V) values, with the filler beyond V."""
    places = span * SPAN + torch.arange(SPAN, device=values.device)
    size = values.shape[1]
    return values.gather(1, places.clamp(max=size - 1)).where(places < size, filler)


def _below(target: Tensor, mass: Tensor) -> Tensor:
    """Return the target, or the next number below `mass` where rounding made the target equal to it: no token would be found."""
    return target.minimum(torch.nextafter(mass, torch.zeros_like(mass)))


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype that a device can sum in."""
    return torch.float32 if device.type == "mps" else torch.float64


def _at(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (R, 1) float32, the entry of each row of (R, V) logits at its token (R,)."""
    return logits.gather(1, tokens[:, None]).float()
