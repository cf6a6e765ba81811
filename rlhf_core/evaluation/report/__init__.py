"""The report of a run or a pipeline: its files read as plain data, made into sections with charts, written as one HTML page."""

from __future__ import annotations

from rlhf_core.infra.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {"rlhf_core.evaluation.report.write": "REPORT report_page write_report"},
)
