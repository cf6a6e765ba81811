"""Measured values in JSON files, of whoever wrote them: an estimate with its interval, or a bare number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.evaluation.report.blocks import figure
from rlhf_core.evaluation.report.run_files import is_number, number_of

INTERVAL = 1.96
"""Standard errors on each side of a value that a 95 % interval of a normal distribution reaches."""


@dataclass(frozen=True)
class MeasuredValue:
    """A value with its 95 % interval, as far as it is known."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return figure(self.value)
        return f"{figure(self.value)} [{figure(self.low)}, {figure(self.high)}]"

    @property
    def signed(self) -> str:
        """The value as a difference: with its sign, and that of each end of the interval."""
        if self.low is None or self.high is None:
            return f"{self.value:+.4g}"
        return f"{self.value:+.4g} [{self.low:+.3g}, {self.high:+.3g}]"

    @property
    def a_share(self) -> bool:
        """Whether it may be a share: between 0 and 1, with an interval."""
        return self.low is not None and 0 <= self.value <= 1


def measured(found: Any) -> MeasuredValue | None:
    """Return a JSON value as a measured one: `{value, error, count, low, high}`, of which `value` must be there, or a number."""
    if is_number(found):
        return MeasuredValue(float(found))
    if not isinstance(found, Mapping) or not is_number(found.get("value")):
        return None
    value, error = float(found["value"]), number_of(found.get("error"))
    low, high = number_of(found.get("low")), number_of(found.get("high"))
    if (low is None or high is None) and error is not None:
        low, high = value - INTERVAL * error, value + INTERVAL * error
    count = found.get("count")
    return MeasuredValue(value, low, high, count if type(count) is int else None)


def metrics_of(found: Mapping[str, Any]) -> dict[str, MeasuredValue]:
    """Return the measured values of `evaluation.json` by name: of its `metrics`, where it has them, else of all its keys."""
    inner = found.get("metrics")
    values = inner if isinstance(inner, Mapping) else found
    return {str(name): one for name, value in values.items() if (one := measured(value)) is not None}


def suites_of(result: Any) -> dict[str, MeasuredValue]:
    """Return the measured value of each suite of a capability test's result."""
    suites = result.get("suites", result) if isinstance(result, Mapping) else result
    found = {}
    for name, suite in _named(suites):
        value = measured(suite) or (measured(suite.get("estimate")) if isinstance(suite, Mapping) else None)
        if value is not None:
            found[name] = value
    return found


def _named(suites: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(suites, Mapping):
        yield from ((str(name), suite) for name, suite in suites.items())
    elif isinstance(suites, list):
        for suite in suites:
            if isinstance(suite, Mapping) and "name" in suite:
                yield str(suite["name"]), suite
