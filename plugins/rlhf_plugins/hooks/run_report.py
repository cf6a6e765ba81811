"""Write `report.html` into the run directory: at evaluations, and at the end (`logging.report`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rlhf_core.plugin import hookimpl, write_report

LEAST_SECONDS = 60.0
"""A run that has lasted less gets no report unless it is asked for: it would take a large share of its time."""
SHARE = 0.02
"""The share of a run's time that its reports at evaluations may take."""
STOPPED = 75
"""Exit code of a run that was asked to stop: it must end soon, and will be resumed."""


class RunReportHook:
    """Writes the report of each run. A fault in it ends no run: the core calls it no more, and warns."""

    def __init__(self) -> None:
        self._began = self._written = time.monotonic()
        self._cost = LEAST_SECONDS * SHARE
        """Seconds that the last report took; at first a guess."""

    @hookimpl
    def run_started(self, run: Any) -> None:
        """Begin to count the run's time."""
        self._began = self._written = time.monotonic()

    @hookimpl
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Write it if enough time has passed since it was written last."""
        if self._wanted(run) and time.monotonic() - self._written >= max(LEAST_SECONDS, self._cost / SHARE):
            self._write(run)

    @hookimpl
    def run_ended(self, run: Any, result: Any) -> None:
        """Write it."""
        if self._wanted(run):
            self._write(run)

    @hookimpl
    def run_failed(self, run: Any, error: BaseException) -> None:
        """Write it, unless the run was asked to stop."""
        if self._wanted(run) and isinstance(error, Exception) and getattr(error, "exit_code", None) != STOPPED:
            self._write(run)

    def _wanted(self, run: Any) -> bool:
        asked = run.config.logging.report
        if run.output is None or asked is False:
            return False
        return bool(asked) or time.monotonic() - self._began >= LEAST_SECONDS

    def _write(self, run: Any) -> None:
        began = time.monotonic()
        write_report(run.output)
        self._written = time.monotonic()
        self._cost = self._written - began
