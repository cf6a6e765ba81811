"""The k-th largest of values that are read in chunks, exactly, without holding them all.

A sample estimates two values between which the k-th largest lies; one pass counts the values above and keeps those between, a few
percent of all. Where the estimate was wrong, the bracket is widened and the values are read again. Of few values all are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from rlhf_core.merging.streams import RUN, Chunk, TensorStream

SMALL = 1 << 20
"""Up to so many values, all are kept."""
SAMPLE_SIZES = (1 << 16, 1 << 22)
"""The fewest and the most values of a sample."""
_TRUST = 4.0
"""Standard errors by which an estimate may be off at first, so that few values are kept: picking them out takes time."""
_WIDER = 0.05
"""How far an estimate may be off, as a share of the ranks, after it was wrong once."""
_HEAVY = 0.01
"""Share of the values from which on equal ones are counted, not kept."""

Measure = Callable[[Chunk], Sequence[Tensor]]
"""What is ranked: from a chunk, the values of each of several rankings, none below zero."""
Streams = Callable[[], Iterable[TensorStream]]
"""Returns the streams of the ranked values, at each call again from their start."""


def kept_count(share: float, count: int) -> int:
    """Return how many of `count` values the share `density` keeps: at least one, else the whole part of the product."""
    # 0.29 * 100 is 28.999… in binary; what is meant is 29.
    return min(count, max(1, math.floor(share * count + 1e-6)))


def magnitudes(chunk: Chunk) -> list[Tensor]:
    """Return |δ| of each model, (N,); in place of the chunk's tensors."""
    return [delta.abs_() for delta in chunk.deltas()]


def thresholds(streams: Streams, measure: Measure, shares: Sequence[float]) -> list[float]:
    """Return, for each ranking, the k-th largest of its values over all streams, with k = `kept_count(share, count)`.

    Args:
        streams: returns the streams, at each call again.
        measure: the values of a chunk, one tensor per ranking.
        shares: for each ranking the share that is kept, in (0, 1].

    Every value as large as the one returned is meant to be kept, ties at the threshold included.
    """
    count = sum(stream.count for stream in streams())
    ranks = [kept_count(share, count) for share in shares]
    if min(ranks) == count:
        return [0.0] * len(shares)  # all are kept, and no value is below zero: nothing need be read
    samples: Sequence[RankSample | None] = [None] * len(ranks)
    if count > SMALL:
        samples = _samples(streams, measure, count, len(ranks))
    found: dict[int, float] = {}
    trust, least = _TRUST, 0.0
    while len(found) < len(ranks):
        brackets: dict[int, Bracket | _AllValues] = {
            ranking: _AllValues(count) if sample is None else Bracket(sample, rank / count, trust, least)
            for ranking, (sample, rank) in enumerate(zip(samples, ranks, strict=True))
            if ranking not in found
        }
        for stream in streams():
            for chunk in stream.chunks():
                values = measure(chunk)
                for ranking, bracket in brackets.items():
                    bracket.add(values[ranking])
        for ranking, bracket in brackets.items():
            if (threshold := bracket.threshold(ranks[ranking])) is not None:
                found[ranking] = threshold
        trust, least = 6 * trust, max(_WIDER, 6 * least)
    return [found[ranking] for ranking in range(len(ranks))]


class SampledRuns(NamedTuple):
    """Values that were sampled from one chunk."""

    runs: numpy.ndarray
    """(runs, length): runs of neighbours."""
    weight: float
    """How many of all values each of these represents."""


class RankSample:
    """Some of the values, from which the value at a rank among all of them is estimated."""

    def __init__(self, parts: Sequence[SampledRuns]) -> None:
        self._parts = parts
        values = numpy.concatenate([part.runs.reshape(-1) for part in parts])
        if len({part.weight for part in parts}) == 1:
            self.values, self._reached = -numpy.sort(-values), numpy.arange(1, len(values) + 1) / len(values)
        else:
            order = numpy.argsort(-values)
            weights = numpy.concatenate([numpy.full(part.runs.size, part.weight) for part in parts])[order].cumsum()
            self.values, self._reached = values[order], weights / weights[-1]

    def at(self, share: float) -> float:
        """Return the value at a share of the ranks, the largest first; infinity before the first, zero after the last."""
        if share <= 0:
            return math.inf
        place = int(numpy.searchsorted(self._reached, share))
        return float(self.values[place]) if place < len(self.values) else 0.0

    def error(self, share: float) -> float:
        """Return the standard error of the sample's rank at a share of the ranks, in the same unit; that of one value at least.

        Neighbours are alike, as in a row of large weights, so the observations are runs, not values. Differences between parts
        are no error, for each represents itself; parts of one run are compared with each other.
        """
        threshold = self.at(min(share, 1.0 - 1.0 / len(self.values)))
        # Of each run how many values reach the threshold, how many are above it, and how many there are, all weighted. Where many
        # values equal the threshold, one of the first two may hardly vary.
        groups: list[list[numpy.ndarray]] = [[]]
        for runs, weight in self._parts:
            counts = [
                (runs >= threshold).sum(axis=1),
                (runs > threshold).sum(axis=1),
                numpy.full(len(runs), runs.shape[1]),
            ]
            found = weight * numpy.stack(counts, axis=1)
            if len(found) > 1:
                groups.append([found])
            else:
                groups[0].append(found)
        tables = [numpy.concatenate(group) for group in groups if group]
        tables = [table for table in tables if len(table) > 1]
        if not tables:
            return 1.0  # of one run it isn't known how runs differ
        variance = max(sum(_variance(table[:, which], table[:, 2]) for table in tables) for which in (0, 1))
        total = sum(part.weight * part.runs.size for part in self._parts)
        return max(max(part.weight for part in self._parts), math.sqrt(variance)) / total


def _variance(counts: numpy.ndarray, lengths: numpy.ndarray) -> float:
    """Return the variance of the sum of counts that go with lengths, each (runs,)."""
    off = counts - counts.sum() / lengths.sum() * lengths
    return float(off @ off) * len(counts) / (len(counts) - 1)


class Bracket:
    """Counts values above a bracket and keeps those inside it.

    Args:
        sample: some of the values.
        share: the wanted rank, as a share of all values.
        trust: how far the sample's ranks may be off, in standard errors.
        least: how far they may be off in any case, as a share of the ranks.
    """

    def __init__(self, sample: RankSample, share: float, trust: float, least: float = 0.0) -> None:
        self.above = self.at_high = self.at_low = 0
        self.inside: list[numpy.ndarray] = []
        values, margin = sample.values, max(least, trust * sample.error(share))
        self.high, self.low = sample.at(share - margin), sample.at(share + margin)
        # Ends that many values share are counted, not kept: a model that was hardly trained is full of zeros, and differences of
        # weights of 16 bits have few values.
        self.counts_low = self.low == 0.0 or float((values == self.low).mean()) > _HEAVY
        self.counts_high = self.low < self.high and float((values == self.high).mean()) > _HEAVY

    def add(self, values: Tensor) -> None:
        """Add some values, (N,) float32, none below zero."""
        flat: Any = values.reshape(-1)
        # numpy compares five times as fast on a CPU as torch does.
        flat = flat.numpy() if flat.device.type == "cpu" else flat
        over = flat >= self.high if self.counts_high else flat > self.high
        inside = (flat > self.low if self.counts_low else flat >= self.low) ^ over
        at_high = _count(flat == self.high) if self.counts_high else 0
        self.above += _count(over) - at_high
        self.at_high += at_high
        self.at_low += _count(flat == self.low) if self.counts_low else 0
        if isinstance(flat, Tensor):
            self.inside.append(flat[inside].cpu().numpy())
        else:
            # Indices first: indexing by a mask takes up to four times as long.
            self.inside.append(flat[numpy.flatnonzero(inside)])

    def threshold(self, rank: int) -> float | None:
        """Return the rank-th largest of all that were added; None where it lies outside the bracket."""
        place = rank - self.above
        if place <= 0:
            return None
        if place <= self.at_high:
            return self.high
        place -= self.at_high
        inside = numpy.concatenate(self.inside) if self.inside else numpy.empty(0, numpy.float32)
        if place <= len(inside):
            inside.partition(len(inside) - place)
            return float(inside[len(inside) - place])
        return self.low if place <= len(inside) + self.at_low else None


class _AllValues:
    """Keeps all of `count` values."""

    def __init__(self, count: int) -> None:
        self._values, self._filled = numpy.empty(count, numpy.float32), 0

    def add(self, values: Tensor) -> None:
        """Add some values, (N,) float32."""
        flat = values.reshape(-1).cpu().numpy()
        self._values[self._filled : self._filled + len(flat)] = flat
        self._filled += len(flat)

    def threshold(self, rank: int) -> float:
        """Return the rank-th largest of all values."""
        place = len(self._values) - rank
        self._values.partition(place)
        return float(self._values[place])


def _count(mask: Any) -> int:
    return int(mask.count_nonzero() if isinstance(mask, Tensor) else numpy.count_nonzero(mask))


def _samples(streams: Streams, measure: Measure, count: int, rankings: int) -> list[RankSample]:
    """Return a sample of each ranking's `count` values: at least a run of every tensor, larger ones in proportion."""
    size = min(SAMPLE_SIZES[1], max(SAMPLE_SIZES[0], count >> 10))
    parts: list[list[SampledRuns]] = [[] for _ in range(rankings)]
    for stream in streams():
        if stream.count == 0:
            continue
        runs = math.ceil(size / RUN * stream.count / count)
        sampled = min(stream.count, RUN * max(1, min(runs, stream.count // RUN)))
        for chunk in stream.sample(runs):
            for part, values in zip(parts, measure(chunk), strict=True):
                flat = values.reshape(-1).cpu().numpy().copy()
                # A small tensor is one run.
                cut = flat.reshape(-1, RUN) if len(flat) % RUN == 0 else flat[None]
                part.append(SampledRuns(cut, stream.count / sampled))
    return [RankSample(one) for one in parts]


def tensor_thresholds(stream: TensorStream, shares: Sequence[float], measure: Measure = magnitudes) -> list[float]:
    """Return `thresholds` of one tensor: for each model the |δ| that the share of its entries reaches."""
    with torch.no_grad():
        return thresholds(lambda: [stream], measure, shares)
