"""What charts show, as numbers without a drawing: lines with bands, histograms, bars, intervals; long curves in bins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

MOST_POINTS = 200
"""Points of a line at most; a longer curve is shown as means over bins of steps."""


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    """Number of its colour, from 0."""
    style: int = 0
    """0 solid, 1 dashed, 2 dotted, 3 dash-dotted."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of a shaded band around it."""
    errors: Sequence[float] | None = None
    """Half-lengths of error bars; a line with them has a mark at each point."""
    marks: bool = False
    """Whether each point has a mark."""


class Captioned:
    """A chart whose notes stand below it."""

    notes: Sequence[str]

    @property
    def caption(self) -> str:
        return " ".join(self.notes)


@dataclass(frozen=True)
class LineChart(Captioned):
    """Curves over a common axis."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    y_label: str = ""
    log: bool = False
    """Whether the vertical axis is logarithmic, if all values allow it."""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Histogram(Captioned):
    """Shares of values in bins, of one or more samples."""

    title: str
    edges: Sequence[float]
    shares: Mapping[str, Sequence[float]]
    """Label → the share of each bin, one fewer than `edges`; they add up to 1."""
    x_label: str
    y_label: str = "share"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Bars(Captioned):
    """Horizontal bars, each divided into parts."""

    title: str
    rows: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    """Label → the length of that part in each row."""
    x_label: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Interval:
    """A measured value in a row of `Intervals`."""

    row: str
    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Intervals(Captioned):
    """Values with their intervals, a row each; those of one row have different labels, such as before and after."""

    title: str
    items: Sequence[Interval]
    x_label: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Span:
    """What took time in a row of `Timeline`, in seconds from its start."""

    row: str
    begin: float
    end: float
    state: str


@dataclass(frozen=True)
class Timeline(Captioned):
    """When things ran."""

    title: str
    spans: Sequence[Span]
    notes: Sequence[str] = field(default_factory=tuple)


Chart = LineChart | Histogram | Bars | Intervals | Timeline


def binned(
    steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS
) -> tuple[list[float], list[float], tuple[list[float], list[float]] | None]:
    """Return a curve with at most so many points, as (x, y, band).

    A curve that is short enough is returned as it is, without a band. Of a longer one each point is the mean over a bin of
    neighbouring steps, and the band reaches from the bin's smallest value to its largest, so that no spike is hidden.
    """
    count = len(values)
    if count <= most:
        return list(steps), list(values), None
    x, y, low, high = [], [], [], []
    for number in range(most):
        part = slice(number * count // most, (number + 1) * count // most)
        inside = values[part]
        x.append(fmean(steps[part]))
        y.append(fmean(inside))
        low.append(min(inside))
        high.append(max(inside))
    return x, y, (low, high)


def histogram(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Return the share of values in each bin; the last bin holds its upper edge, and values outside count in the outer bins."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        place = sum(value >= edge for edge in edges[1:-1])
        counts[place] += 1
    return [count / len(values) for count in counts] if values else [0.0] * len(counts)


def edges_of(values: Sequence[float], bins: int = 20) -> list[float]:
    """Return the edges of equal bins from the smallest value to the largest; of equal values, one bin around them."""
    low, high = min(values), max(values)
    if not high > low or not math.isfinite(high - low):
        return [low - 0.5, low + 0.5]
    edges = [low + (high - low) * number / bins for number in range(bins + 1)]
    edges[-1] = high
    return edges
