"""A limit on a run's time, for slow tests on a slow machine: `pytest --within MINUTES` begins no test after it, and says so."""

from __future__ import annotations

import time

import pytest

_BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--within",
        type=float,
        metavar="MINUTES",
        help="skip the tests that haven't begun so many minutes after the start",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--within")
    if limit is not None and time.monotonic() - _BEGAN >= 60 * limit:
        pytest.skip(f"not begun within {limit:g} minutes")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    late = [one for one in terminalreporter.stats.get("skipped", ()) if "not begun within" in str(one.longrepr)]
    if late:
        terminalreporter.section("not run")
        terminalreporter.line(f"{len(late)} tests hadn't begun when the time was over:")
        for name in sorted({one.nodeid.partition("::")[0] for one in late}):
            terminalreporter.line(f"  {name}")
