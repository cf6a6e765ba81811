"""Charts of curves as a picture of their own, PNG or SVG, for slides and papers: in fixed colours on white."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.evaluation.report.chart_data import LineChart
from rlhf_core.evaluation.report.svg_charts import FAINT, INK, SETTINGS, can_draw, draw_lines
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.files import replace_file, storage_errors

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart with any colour vision (Okabe & Ito 2008)."""
_REAL = {INK: "#1f2328", FAINT: "#c9ced6", "none": "white"}
_SUFFIXES = (".png", ".svg")
_WIDTH, _HEIGHT, _DPI = 7.2, 3.6, 150
"""Inches of a chart; dots of an inch of a PNG."""


def require_drawable(path: Path) -> None:
    """Refuse a file that no chart can be written to, before anything is read.

    Raises:
        ConfigError: it is named as no picture that can be written, or matplotlib isn't installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            "is named neither as PNG nor as SVG", place="--output", got=str(path), fix="name it curves.png"
        )
    if not can_draw():
        fix = "pip install 'rlhf-core[plot]', or leave `--output` out to draw in the terminal"
        raise ConfigError("pictures need matplotlib", place="--output", got="not installed", fix=fix)


def write_chart_file(charts: Sequence[LineChart], path: Path) -> Path:
    """Write charts under each other as one picture, whose format the file's name says; return the path.

    Raises:
        ConfigError: as of `require_drawable`.
        StorageError: the file can't be written.
    """
    require_drawable(path)
    import matplotlib
    from matplotlib.figure import Figure

    settings = {key: _REAL.get(value, value) if isinstance(value, str) else value for key, value in SETTINGS.items()}
    settings |= {"svg.fonttype": "path", "svg.hashsalt": "rlhf"}
    kind = path.suffix.lower().removeprefix(".")
    fonts = logging.getLogger("matplotlib.font_manager")
    level, file = fonts.level, io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font doesn't have
        fonts.setLevel(logging.ERROR)
        try:
            figure = Figure(figsize=(_WIDTH, _HEIGHT * len(charts)), layout="constrained")
            for axes, chart in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts, strict=True):
                axes.set_title(chart.title)
                draw_lines(axes, chart, _COLOURS)
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(file, format=kind, dpi=_DPI, metadata=metadata)
        finally:
            fonts.setLevel(level)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, file.getvalue())
    return path
