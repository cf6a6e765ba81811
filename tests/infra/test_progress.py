"""Progress in bytes, without a terminal; bars on a terminal are tested with the commands that show them."""

from __future__ import annotations

import logging
import time

import pytest

from rlhf_core.infra.progress import ByteBar


def test_without_a_terminal_a_line_now_and_then_says_how_far(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), ByteBar("merging") as bar:
        for seconds, done in ((0, 1_000_000), (10, 2_000_000), (31, 4_100_000), (40, 5_000_000), (62, 7_200_000)):
            now = 100.0 + seconds
            bar(done, 10_000_000)
        bar(0, 10_000_000)  # the next trial of a soup
        now += 31
        bar(0, 10_000_000)
        bar(10_000_000, 10_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        "merging: 4.1 MB of 10.0 MB, 100.0 kB/s, 0:00:59 left",
        "merging: 7.2 MB of 10.0 MB, 100.0 kB/s, 0:00:28 left",
        "merging: 0 bytes of 10.0 MB, 0 bytes/s, time left unknown",
    ]
