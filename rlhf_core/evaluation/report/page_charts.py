"""Charts made into pictures of one page: each with ids of its own, or none at all where they can't be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_core.evaluation.report.blocks import Picture, Pictures
from rlhf_core.evaluation.report.chart_data import Chart
from rlhf_core.evaluation.report.svg_charts import can_draw, draw_chart

MOST_CHARTS = 240
"""Charts of a page; further ones are left out, and the page says so."""


@dataclass
class PageCharts:
    """Draws the charts of one page."""

    possible: bool
    """Whether matplotlib is installed."""
    drawn: int = 0
    left_out: int = 0

    @classmethod
    def create(cls) -> PageCharts:
        return cls(can_draw())

    def prefix(self) -> str:
        """Return a prefix for the ids of the next picture."""
        self.drawn += 1
        return f"v{self.drawn}"

    def pictures(self, charts: Sequence[Chart]) -> list[Pictures]:
        """Return the charts beside each other; none where they can't be drawn."""
        if not self.possible or not charts:
            return []
        room = max(0, MOST_CHARTS - self.drawn)
        self.left_out += max(0, len(charts) - room)
        made = [Picture(chart.title, draw_chart(chart, self.prefix()), chart.caption) for chart in charts[:room]]
        return [Pictures(made)] if made else []

    @property
    def notes(self) -> list[str]:
        """What a reader should know of charts that are missing."""
        found = []
        if not self.possible:
            found.append("Charts are left out: they need matplotlib (pip install 'rlhf-core[plot]').")
        if self.left_out:
            found.append(f"{self.left_out} charts are left out: a page holds {MOST_CHARTS} at most.")
        return found
