"""Charts as SVG, drawn by matplotlib: text stays text, and colours are the page's variables, so that light and dark both work.

The drawing uses a marker colour for each of the page's colours, and they are replaced in the SVG. Nothing else of a chart refers
to anything outside of it: metadata and namespaces are removed, and ids get a prefix, since a page holds many charts.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rlhf_core.evaluation.report.chart_data import Bars, Chart, Histogram, Intervals, Line, LineChart, Timeline
from rlhf_core.infra.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 6
"""Colours of lines that the page defines: `--c1` to `--c6`."""
INK, FAINT = "#0a0b01", "#0a0b02"
_LINES = [f"#0a0b1{number}" for number in range(COLOURS)]
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"} | {
    marker: f"var(--c{number})" for number, marker in enumerate(_LINES, 1)
}
_STATES = {"finished": 2, "running": 0, "failed": 3, "rolled_back": 1, "skipped": 5, "waiting": 5}
"""Status of a stage → number of its colour, from 0; another status has the fifth."""
_STYLES: list[Any] = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5))]
_LABEL = 44
"""Characters of a label at most."""
_ROOM = 60
"""Characters that fit beside each other over the axes."""
_WIDTH, _HEIGHT, _ROW = 4.6, 2.6, 0.3
"""Inches: of a chart, and of a row of bars. One is 72 units of the SVG."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
"""How every chart looks, in the markers of the page's colours."""
_LONG = re.compile(r"-?\d+\.\d{2,}")
"""A number with more decimals than can be seen, in units of which an inch has 72."""
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


def can_draw() -> bool:
    """Return whether charts can be drawn: whether matplotlib is installed."""
    try:
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw_chart(chart: Chart, prefix: str) -> str:
    """Return a chart as an `<svg>` element for a page.

    Args:
        prefix: of the ids in it, another one for each chart of a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": prefix}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font, which measures alone, doesn't have
        fonts.setLevel(logging.ERROR)
        try:
            figure = Figure(figsize=(_WIDTH, _height(chart)), layout="constrained")
            _draw(figure, chart)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        finally:
            fonts.setLevel(level)
    return embedded(file.getvalue(), prefix, chart.title)


def embedded(svg: str, prefix: str, title: str) -> str:
    """Return an SVG document as an element of a page: coloured by its variables, and with nothing that refers outside.

    Raises:
        ValueError: it isn't well-formed.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"isn't SVG: {error}") from None
    _clean(root, prefix)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", title)
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
    pattern = "|".join(map(re.escape, _VARIABLES))
    return re.sub(pattern, lambda found: _VARIABLES[found.group()], text)


def _clean(element: ElementTree.Element, prefix: str) -> None:
    """Remove namespaces, metadata and style sheets, and prefix ids and what refers to them, in an element and all inside."""
    element.tag = element.tag.removeprefix(_SVG)
    attributes = {}
    for name, value in element.attrib.items():
        if name == _LINK:
            name = "href"
        if name == "id" and element.tag == "g":
            continue  # nothing refers to a group
        if name == "id":
            value = f"{prefix}-{value}"
        elif name in ("d", "x", "y", "transform"):
            value = _LONG.sub(lambda found: f"{float(found.group()):.1f}", " ".join(value.split()))
        elif name == "href":
            value = f"#{prefix}-{value.removeprefix('#')}"
        else:
            value = re.sub(r"url\(#", f"url(#{prefix}-", value)
        if "}" not in name:
            attributes[name] = value
    element.attrib.clear()
    element.attrib.update(attributes)
    for child in list(element):
        if not isinstance(child.tag, str) or child.tag.removeprefix(_SVG) in ("metadata", "style"):
            element.remove(child)
        else:
            _clean(child, prefix)


def _height(chart: Chart) -> float:
    """Return a chart's height in inches."""
    if isinstance(chart, Timeline):
        rows = len({span.row for span in chart.spans})
    elif isinstance(chart, Bars):
        rows = len(chart.rows) + (1 if len(chart.parts) > 1 else 0)
    elif isinstance(chart, Intervals):
        rows = len({item.row for item in chart.items}) + 1
    else:
        return _HEIGHT
    return max(1.3, 0.85 + _ROW * rows)


def _draw(figure: Figure, chart: Chart) -> None:
    """Draw a chart into a figure."""
    axes: Axes = figure.subplots()
    axes.set_title(_short(chart.title, 56))
    if isinstance(chart, LineChart):
        draw_lines(axes, chart)
    elif isinstance(chart, Histogram):
        _draw_histogram(axes, chart)
    elif isinstance(chart, Bars):
        _draw_bars(axes, chart)
    elif isinstance(chart, Intervals):
        _draw_intervals(axes, chart)
    else:
        _draw_timeline(axes, chart)


def draw_lines(axes: Axes, chart: LineChart, colours: Sequence[str] = ()) -> None:
    """Draw curves with their legend.

    Args:
        colours: of the lines; without them the markers that a page replaces.
    """
    from matplotlib.ticker import LogFormatter, MaxNLocator

    for line in chart.lines:
        _draw_line(axes, line, colours or _LINES)
    if chart.log and all(value > 0 for line in chart.lines for value in line.y):
        axes.set_yscale("log")
        # Matplotlib's own labels of a logarithmic axis are formulae, which the page couldn't show.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    else:
        # An offset beside the axis is easily overlooked.
        axes.ticklabel_format(axis="y", useOffset=False)
    if all(float(x).is_integer() for line in chart.lines for x in line.x):
        # As the default locator does, but with no step 2.5.
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.margins(x=0.02)
    if len(chart.lines) > 1 or chart.lines[0].label:
        _legend(axes)


def _draw_line(axes: Axes, line: Line, colours: Sequence[str]) -> None:
    colour = colours[line.colour % len(colours)]
    marker = "o" if line.marks or line.errors is not None or len(line.x) == 1 else None
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=colour, alpha=0.18, linewidth=0)
    if line.errors is not None:
        axes.errorbar(line.x, line.y, yerr=line.errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    axes.plot(
        line.x, line.y, color=colour, linestyle=_STYLES[line.style % len(_STYLES)], marker=marker, markersize=3.5,
        label=_short(line.label),
    )  # fmt: skip


def _draw_histogram(axes: Axes, chart: Histogram) -> None:
    """Draw each sample's shares as narrow bars beside each other in their bins."""
    several = len(chart.shares)
    for number, (label, shares) in enumerate(chart.shares.items()):
        widths = [right - left for left, right in zip(chart.edges, chart.edges[1:], strict=False)]
        left = [
            edge + width * (0.08 + 0.84 * number / several) for edge, width in zip(chart.edges, widths, strict=False)
        ]
        axes.bar(
            left, shares, width=[0.84 * width / several for width in widths], align="edge",
            color=_LINES[number % COLOURS], label=_short(label),
        )  # fmt: skip
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(visible=False, axis="x")
    if several > 1 or "" not in chart.shares:
        _legend(axes)


def _draw_bars(axes: Axes, chart: Bars) -> None:
    places = range(len(chart.rows))
    before = [0.0] * len(chart.rows)
    for number, (label, lengths) in enumerate(chart.parts.items()):
        axes.barh(places, lengths, left=before, height=0.62, color=_LINES[number % COLOURS], label=_short(label))
        before = [start + length for start, length in zip(before, lengths, strict=True)]
    _rows(axes, chart.rows)
    _few_figures(axes)
    axes.set_xlabel(chart.x_label)
    if len(chart.parts) > 1:
        _legend(axes)


def _draw_intervals(axes: Axes, chart: Intervals) -> None:
    rows = list(dict.fromkeys(item.row for item in chart.items))
    labels = list(dict.fromkeys(item.label for item in chart.items))
    for number, label in enumerate(labels):
        own = [item for item in chart.items if item.label == label]
        # Those of one row stand a little under each other.
        shift = 0.0 if len(labels) == 1 else 0.36 * (number / (len(labels) - 1) - 0.5)
        places = [rows.index(item.row) + shift for item in own]
        values = [item.value for item in own]
        below = [0.0 if item.low is None else max(0.0, item.value - item.low) for item in own]
        above = [0.0 if item.high is None else max(0.0, item.high - item.value) for item in own]
        axes.errorbar(
            values, places, xerr=[below, above], fmt="o", markersize=4, capsize=2.5, elinewidth=1.2,
            color=_LINES[number % COLOURS], label=_short(label),
        )  # fmt: skip
    _rows(axes, rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(chart.x_label)
    if len(labels) > 1:
        _legend(axes)


def _draw_timeline(axes: Axes, chart: Timeline) -> None:
    rows = list(dict.fromkeys(span.row for span in chart.spans))
    end = max(span.end for span in chart.spans)
    unit, name = (1.0, "seconds") if end < 180 else (60.0, "minutes") if end < 10_800 else (3600.0, "hours")
    for span in chart.spans:
        # One that took hardly any time is still seen.
        width = max(span.end - span.begin, end * 0.004)
        colour = _LINES[_STATES.get(span.state, 4)]
        axes.barh(rows.index(span.row), width / unit, left=span.begin / unit, height=0.62, color=colour)
    _rows(axes, rows)
    axes.set_xlabel(f"{name} since the start")


def _few_figures(axes: Axes) -> None:
    """Mark a horizontal axis in few places, and with thousands as `k`, so that large numbers stand apart."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    if axes.get_xlim()[1] >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _rows(axes: Axes, rows: Sequence[str]) -> None:
    """Name the rows of a chart with horizontal bars, the first on top."""
    axes.set_yticks(range(len(rows)), [_short(row, 22) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()


def _legend(axes: Axes) -> None:
    """Add a legend above the axes, under the title, where no curve can be under it, in as many columns as fit."""
    labels = axes.get_legend_handles_labels()[1]
    columns = max(1, min(len(labels), int(_ROOM / (max(map(len, labels)) + 6))))
    lines = -(-len(labels) // columns)
    axes.set_title(axes.get_title(loc="left"), pad=4 + 12.5 * lines)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.1, borderpad=0.1,
        handlelength=1.6, columnspacing=1.2, handletextpad=0.5, labelspacing=0.25,
    )  # fmt: skip


def _short(text: str, most: int = _LABEL) -> str:
    """Return a label that fits, with control characters as escapes; one that begins with `_` would be left out of a legend."""
    line = printable(text)
    line = line if len(line) <= most else line[: most - 1] + "…"
    return f"\u200b{line}" if line.startswith("_") else line
