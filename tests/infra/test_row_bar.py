"""The progress of sampling: the time left follows from the tokens drawn, those of rows in progress counted."""

from __future__ import annotations

import logging

import pytest

from rlhf_core.infra import progress
from rlhf_core.infra.progress import RowBar


def test_lines_in_a_log_have_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO, "rlhf_core.infra.progress")
    with RowBar(total=12, done=2) as bar:
        now += 31
        bar.add_tokens(310)
        bar.update(3, 310)
        now += 31
        bar.add_tokens(310)  # of a second row, which isn't answered yet
        now += 1
        bar.add_tokens(0)
        now += 31
        bar.update(12, 10)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "sampling: 2 of 12 rows, 10 tokens/s, – left",
        "sampling: 3 of 12 rows, 10 tokens/s, 0:04:08 left",
    ]


def test_without_reported_tokens_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with RowBar(total=4) as bar:
        now += 10
        bar.update(1, 50)
        assert bar.tokens_per_second == 5
