"""Run a plugin's conformance tests without pytest and print one line per check, as `rlhf check` does."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import SkipTest

from rlhf_core import registry
from rlhf_core.infra.errors import PluginError, RLHFError, describe_error, printable
from rlhf_core.infra.log import LOGGER, hide_library_bars
from rlhf_core.registry.plugin_logs import plugin_packages
from rlhf_core.testing.contract import Contract

Status = Literal["ok", "failed", "expected", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check. `expected` is a failure that was expected; `reason` is empty where it is `ok`."""

    name: str
    status: Status
    reason: str
    seconds: float


def contract_of(kind: str) -> type[Contract]:
    """Return the contract of a kind of plugin: `TrainerContract` for `trainer`."""
    from rlhf_core import testing

    return getattr(testing, f"{kind.capitalize()}Contract")


def run_checks(contract: type[Contract]) -> Iterator[CheckResult]:
    """Run the checks of a contract in order, and yield each result."""
    from rlhf_core.infra.devices import one_thread

    for name in contract.checks():
        began = time.perf_counter()
        # With tensors this small threads mostly wait for each other, on a busy machine for minutes.
        with _quiet(), one_thread():
            status, reason = _run(contract, name)
        yield CheckResult(name, status, reason, time.perf_counter() - began)


def run_contract(
    kind: str,
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> int:
    """Check a registered plugin, printing one line per check to stdout; return 0, or exit code 5 where a check fails.

    Args:
        kind: `trainer`, `reward`, `sampler`, `merger` or `hook`.
        name: its name in the registry, qualified or not.
        options: options of the method to check it with.
        expected_failures: name of a check → why it fails; such a check that passes counts as a failure.

    Raises:
        UnknownPlugin, PluginError: the plugin isn't installed or can't be loaded.
        ConfigError: there is no such kind, or no check of a name in `expected_failures`.
    """
    kind = registry.parse_kind(kind)
    base = contract_of(kind)
    hide_library_bars()
    registry.get(kind, name)  # a plugin that can't be loaded is one error, not a failure of every check
    members = {"method": name, "options": options or {}, "expected_failures": expected_failures or {}}
    counts: Counter[str] = Counter()
    began = time.perf_counter()
    for check in run_checks(type(base.__name__, (base,), members)):
        counts[check.status] += 1
        line = f"{check.status:<8} {check.seconds:5.1f} s  {check.name}"
        print(printable(line + (f": {check.reason}" if check.reason else ""), lines=True), flush=True)
    summary = ", ".join(
        f"{counts[status]} {status}" for status in ("ok", "failed", "expected", "skipped") if counts[status]
    )
    print(f"{kind} {name}: {summary} in {time.perf_counter() - began:.1f} s", flush=True)
    return PluginError.exit_code if counts["failed"] else 0


def _run(contract: type[Contract], name: str) -> tuple[Status, str]:
    """Run one check; return its status and the reason where it isn't `ok`."""
    expected = contract.expected_failures.get(name)
    # Without pytest's mark of an expected failure: here the failure itself is what counts.
    test = getattr(contract, name)
    test = getattr(test, "_unmarked", test)
    try:
        test(contract())
    except SkipTest as skip:
        return "skipped", str(skip)
    except Exception as error:
        return ("failed", _why_failed(error)) if expected is None else ("expected", expected)
    if expected is not None:
        return "failed", f"passes, but was expected to fail: {expected}"
    return "ok", ""


def _why_failed(error: Exception) -> str:
    """Return in one line why a check failed: the message of an assertion or of the project's errors, else type and message."""
    if isinstance(error, AssertionError | RLHFError):
        return " ".join(str(error).split()) or "assertion failed"
    return describe_error(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings, and what the checks' training runs log below the level of errors."""
    loggers = [logging.getLogger(name) for name in (LOGGER, *plugin_packages())]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
