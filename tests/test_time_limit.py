"""The limit on a run's time skips what hasn't begun, and names it."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]
TESTS = "def test_one(): pass\ndef test_two(): pass\n"


@pytest.mark.parametrize(("limit", "passed", "skipped"), [("0", 0, 2), ("1000", 2, 0)])
def test_tests_after_the_limit_are_skipped_and_named(
    pytester: pytest.Pytester, limit: str, passed: int, skipped: int
) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest("-p", "time_limit", "--within", limit)
    result.assert_outcomes(passed=passed, skipped=skipped)
    said = "2 tests hadn't begun when the time was over:" in result.outlines
    assert said == bool(skipped) and result.ret == 0


def test_without_a_limit_all_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    pytester.runpytest("-p", "time_limit").assert_outcomes(passed=2)
