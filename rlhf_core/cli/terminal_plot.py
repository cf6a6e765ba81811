"""Curves drawn in a terminal: by dots of braille in a colour each, or by letters where there are no colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rlhf_core.evaluation.report.chart_data import Line, LineChart
from rlhf_core.infra.errors import printable

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character's dots, by row and column."""
_CODES = ("36", "33", "35", "32", "31", "34")
"""Colours of lines, as terminals number them."""
_LETTERS = "*xo+#@ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Letters of curves where there are no colours, in their order."""
_PATTERNS = (1, 4, 2, 3)
"""Of lines of styles 0 to 3, how many dots are drawn of every `n + 2`; of style 0 all are."""
_LEAST_WIDTH, _LEAST_HEIGHT = 20, 5


def plot_lines(chart: LineChart, *, width: int, height: int, colours: bool) -> list[str]:
    """Return a chart as lines of text: its title with a legend, the axes, and the curves.

    Args:
        width, height: columns, and rows of the curves' part.
        colours: whether the terminal shows colours and braille; else each curve has a letter.
    """
    log = chart.log and all(value > 0 for line in chart.lines for value in line.y)
    lines = [_points(line, log) for line in chart.lines]
    xs, ys = [x for line in lines for x, _ in line], [y for line in lines for _, y in line]
    low, high = _range(ys)
    values = _log_ticks(low, high) if log else _ticks(low, high, height // 3)
    ticks = {_row(value, low, high, height): _label(10**value if log else value) for value in values}
    margin = max(map(len, ticks.values()))
    columns = max(width - margin - 2, _LEAST_WIDTH)
    across = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    canvas = _Canvas(columns, max(height, _LEAST_HEIGHT), across, (low, high), colours)
    pens = _colours(chart.lines) if colours else _letters(chart.lines)
    for line, points, pen in zip(chart.lines, lines, pens, strict=True):
        canvas.draw(points, pen, line.style, marks=line.marks)
    made = _legend(chart, pens, width, colours)
    for row, text in enumerate(canvas.rows()):
        label = ticks.get(row, "")
        made.append(f"{label:>{margin}} {('┤' if label else '│') if colours else '|'}{text}".rstrip())
    made.append(" " * margin + (" └" + "─" * columns if colours else " +" + "-" * columns))
    made.append(" " * (margin + 2) + _below(min(xs), max(xs), chart.x_label, columns))
    return made


def _colours(lines: Sequence[Line]) -> list[str]:
    """Return the code of each curve's colour; curves of one colour differ in style."""
    return [_CODES[line.colour % len(_CODES)] for line in lines]


def _letters(lines: Sequence[Line]) -> list[str]:
    """Return a letter for each curve: those that differ in colour or style differ in letter, as far as there are any."""
    numbers: dict[tuple[int, int], int] = {}
    for line in lines:
        numbers.setdefault((line.colour, line.style), len(numbers))
    return [_LETTERS[numbers[line.colour, line.style] % len(_LETTERS)] for line in lines]


class _Canvas:
    """A grid of characters on which curves are drawn, each of 2 × 4 dots with colours, else of one."""

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float], colours: bool) -> None:
        self._width, self._height, self._x, self._y, self._colours = width, height, x, y, colours
        self._across, self._down = (2, 4) if colours else (1, 1)
        self._bits = [[0] * width for _ in range(height)]
        self._pens = [[""] * width for _ in range(height)]

    def draw(self, points: Sequence[tuple[float, float]], pen: str, style: int, *, marks: bool) -> None:
        """Draw a curve through points, over what is drawn already; `marks` makes each point stand out.

        Args:
            pen: the code of its colour, or its letter.
        """
        dots = [self._dot(x, y) for x, y in points]
        period = _PATTERNS[style % len(_PATTERNS)]
        for number, (across, down) in enumerate(_path(dots)):
            if style % len(_PATTERNS) == 0 or number % (period + 2) < period:
                self._set(across, down, pen)
        for across, down in dots if marks or len(dots) == 1 else ():
            for beside, below in ((0, 0), (1, 0), (0, 1), (1, 1)) if self._colours else ((0, 0),):
                self._set(across + beside, down + below, pen)

    def _dot(self, x: float, y: float) -> tuple[int, int]:
        """Return the dot of a point: its column, and its row from the top."""
        (left, right), (low, high) = self._x, self._y
        across = round((x - left) / (right - left) * (self._width * self._across - 1))
        down = round((high - y) / (high - low) * (self._height * self._down - 1))
        return across, down

    def _set(self, across: int, down: int, pen: str) -> None:
        column, row = across // self._across, down // self._down
        if 0 <= row < self._height and 0 <= column < self._width:
            self._bits[row][column] |= _DOTS[down % 4][across % 2]
            self._pens[row][column] = pen

    def rows(self) -> Iterator[str]:
        """Yield the rows of the grid as text, from the top."""
        for bits, pens in zip(self._bits, self._pens, strict=True):
            if not self._colours:
                yield "".join(pen or " " for pen in pens)
                continue
            text, before = "", ""
            for bit, pen in zip(bits, pens, strict=True):
                if bit and pen != before:
                    text, before = f"{text}\x1b[{pen}m", pen
                text += chr(0x2800 + bit) if bit else " "
            yield f"{text}\x1b[0m" if before else text


def _points(line: Line, log: bool) -> list[tuple[float, float]]:
    """Return the points of a curve, their heights as logarithms where the axis is logarithmic."""
    return [(float(x), math.log10(y) if log else float(y)) for x, y in zip(line.x, line.y, strict=True)]


def _path(dots: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the dots of straight lines from each dot to the next."""
    yield from dots[:1]
    for (x0, y0), (x1, y1) in pairwise(dots):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for number in range(1, steps + 1):
            yield round(x0 + (x1 - x0) * number / steps), round(y0 + (y1 - y0) * number / steps)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis that shows all values."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return round values from `low` to `high`, at most so many, and at least one."""
    size = 10.0 ** math.floor(math.log10(high - low))
    steps = [size * factor for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0)]
    step = next((one for one in steps if (high - low) / one <= max(most, 2)), steps[-1])
    first = math.ceil(low / step - 1e-9)
    found = [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
    return found or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the logarithms of round values between two others: powers of ten, and where those are few, values between."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 2, 5), range(1, 10)):
        found = [power + math.log10(factor) for power in powers for factor in factors]
        inside = [value for value in found if low - 1e-9 <= value <= high + 1e-9]
        if len(inside) > 2:
            return inside
    return _ticks(low, high, 4)


def _row(value: float, low: float, high: float, height: int) -> int:
    """Return the row of a value, from the top."""
    return round((high - value) / (high - low) * (max(height, _LEAST_HEIGHT) - 1))


def _label(value: float) -> str:
    """Return a tick's value as text, 0 where it is that but for rounding."""
    return f"{round(value, 12) + 0.0:.4g}"


def _below(low: float, high: float, name: str, columns: int) -> str:
    """Return the line under the horizontal axis: its ends, and its name between them."""
    left, right = f"{low:,.10g}", f"{high:,.10g}"
    room = columns - len(left) - len(right)
    return f"{left}{name:^{room}}{right}" if room > len(name) + 1 else f"{left} … {right}"


def _legend(chart: LineChart, pens: Sequence[str], width: int, colours: bool) -> list[str]:
    """Return the title, and under it which curve is which, in as many lines as that takes."""
    made = [printable(chart.title) + (" (logarithmic)" if chart.log else "")]
    line, length = "", 0
    for one, pen in zip(chart.lines, pens, strict=True):
        if not one.label:
            continue
        label = printable(one.label)[: width - 4]
        sign = ("━━", "╍╍", "┅┅", "┉┉")[one.style % len(_PATTERNS)] if colours else f"{pen} "
        shown = f"\x1b[{pen}m{sign}\x1b[0m {label}" if colours else f"{sign}{label}"
        size = 3 + len(label)
        if length and length + 3 + size > width:
            made.append(line)
            line, length = "", 0
        line, length = (f"{line}   {shown}", length + 3 + size) if length else (shown, size)
    return [*made, line] if line else made
