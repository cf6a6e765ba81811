"""The k-th largest of values that pass by in chunks, exactly, without holding them all.

A sample guesses two values between which the k-th largest lies; one pass counts what lies above and keeps what lies between, a
few percent of all. Where the guess was wrong, it is widened and the values pass once more. A tensor of few values is
simply kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy
import torch
from torch import Tensor

from rlhf_core.merging.streams import Chunk, TensorStream

SMALL = 1 << 20
"""Up to so many values are simply kept and partitioned."""
_SAMPLES = (1 << 14, 1 << 22)
"""The fewest and the most values of a sample."""
_MARGIN = 0.03
"""How far the smallest sample is trusted, as a share of the ranks: seven standard errors of independent values, for runs of
neighbours aren't quite that. A larger sample is trusted more, so that what lies between stays few."""
_HEAVY = 0.01

Measure = Callable[[Chunk], Sequence[Tensor]]
"""What is ranked: from a chunk, the values of each of several rankings, none below zero."""


def kept_count(share: float, count: int) -> int:
    """Return how many of `count` values the share `density` keeps: at least one, else the whole part of the product."""
    # 0.29 * 100 is 28.999… in binary; what is meant is 29.
    return min(count, max(1, math.floor(share * count + 1e-6)))


def magnitudes(chunk: Chunk) -> list[Tensor]:
    """Return |δ| of each model, (N,); in place of the chunk's tensors."""
    return [delta.abs_() for delta in chunk.deltas()]


def thresholds(streams: Callable[[], Iterable[TensorStream]], measure: Measure, shares: Sequence[float]) -> list[float]:
    """Return, for each ranking, the k-th largest of its values over all streams, with k = `kept_count(share, count)`.

    Args:
        streams: makes the streams anew each time that it is called.
        measure: the values of a chunk, one tensor a ranking.
        shares: for each ranking the share that is kept, in (0, 1].

    Every value that is as large as the one returned is meant to be kept, ties at the threshold included.
    """
    count = sum(stream.count for stream in streams())
    ranks = [kept_count(share, count) for share in shares]
    if min(ranks) == count:
        return [0.0] * len(shares)  # all are kept, and no value is below zero: nothing need be read
    if count <= SMALL:
        return _partitioned(streams, measure, ranks, count)
    size = min(_SAMPLES[1], max(_SAMPLES[0], count >> 10))
    sample, margin = _sample(streams, measure, count, len(shares), size), _MARGIN * math.sqrt(_SAMPLES[0] / size)
    found: dict[int, float] = {}
    while len(found) < len(shares):
        brackets = {
            ranking: Bracket(sample[ranking], ranks[ranking] / count, margin)
            for ranking in range(len(shares))
            if ranking not in found
        }
        for chunk in _chunks(streams):
            values = measure(chunk)
            for ranking, bracket in brackets.items():
                bracket.add(values[ranking])
        for ranking, bracket in brackets.items():
            if (threshold := bracket.threshold(ranks[ranking])) is not None:
                found[ranking] = threshold
        margin *= 6
    return [found[ranking] for ranking in range(len(shares))]


def _partitioned(
    streams: Callable[[], Iterable[TensorStream]], measure: Measure, ranks: Sequence[int], count: int
) -> list[float]:
    """Keep all values, and partition them."""
    rankings, filled = numpy.empty((len(ranks), count), numpy.float32), 0
    for chunk in _chunks(streams):
        for ranking, values in zip(rankings, measure(chunk), strict=True):
            ranking[filled : filled + values.numel()] = values.reshape(-1).cpu().numpy()
        filled += values.numel()
    for ranking, rank in zip(rankings, ranks, strict=True):
        ranking.partition(count - rank)
    return [float(ranking[count - rank]) for ranking, rank in zip(rankings, ranks, strict=True)]


class Bracket:
    """Counts values above a bracket and keeps those inside it.

    Args:
        sample: some of the values, the largest first.
        share: the rank that is looked for, as a share of all values.
        margin: how far the sample is trusted, in the same unit.
    """

    def __init__(self, sample: numpy.ndarray, share: float, margin: float) -> None:
        size = len(sample)
        first, last = int((share - margin) * size), int((share + margin) * size) + 1
        self.high = float(sample[first]) if first > 0 else math.inf
        self.low = float(sample[last]) if last < size else 0.0
        # At least one value wide: a value that many share is told by its count.
        self.high = max(self.high, float(numpy.nextafter(numpy.float32(self.low), numpy.float32(math.inf))))
        # Many values that equal the lower end are counted, not kept: a model that was hardly trained is full of zeros.
        self.counts_low = self.low == 0.0 or float((sample == self.low).mean()) > _HEAVY
        self.above = self.at_low = 0
        self.inside: list[numpy.ndarray] = []

    def add(self, values: Tensor) -> None:
        """Take some values, (N,) float32, none below zero."""
        flat = values.reshape(-1)
        if flat.device.type != "cpu":
            above, inside = flat >= self.high, flat > self.low if self.counts_low else flat >= self.low
            self.above += int(above.count_nonzero())
            self.at_low += int((flat == self.low).count_nonzero()) if self.counts_low else 0
            self.inside.append(flat[inside.logical_xor_(above)].cpu().numpy())
            return
        # numpy compares five times as fast here as torch does.
        host = flat.numpy()
        over, within = host >= self.high, host > self.low if self.counts_low else host >= self.low
        self.above += int(numpy.count_nonzero(over))
        self.at_low += int(numpy.count_nonzero(host == self.low)) if self.counts_low else 0
        self.inside.append(host[numpy.logical_xor(within, over, out=within)])

    def threshold(self, rank: int) -> float | None:
        """Return the rank-th largest of all that were added; None where it lies outside the bracket."""
        inside = numpy.concatenate(self.inside) if self.inside else numpy.empty(0, numpy.float32)
        place = rank - self.above
        if place <= 0:
            return None
        if place <= len(inside):
            return float(numpy.partition(inside, len(inside) - place)[len(inside) - place])
        return self.low if place <= len(inside) + self.at_low else None


def _chunks(streams: Callable[[], Iterable[TensorStream]]) -> Iterator[Chunk]:
    for stream in streams():
        yield from stream.chunks()


def _sample(
    streams: Callable[[], Iterable[TensorStream]], measure: Measure, count: int, rankings: int, size: int
) -> list[numpy.ndarray]:
    parts: list[list[numpy.ndarray]] = [[] for _ in range(rankings)]
    for stream in streams():
        for chunk in stream.sample(math.ceil(size * stream.count / count)):
            for part, values in zip(parts, measure(chunk), strict=True):
                part.append(values.reshape(-1).cpu().numpy().copy())
    return [-numpy.sort(-numpy.concatenate(part)) for part in parts]


def tensor_thresholds(stream: TensorStream, shares: Sequence[float], measure: Measure = magnitudes) -> list[float]:
    """Return `thresholds` of one tensor: for each model the |δ| that the share of its entries reaches."""
    with torch.no_grad():
        return thresholds(lambda: [stream], measure, shares)
