"""Run a plugin's contract and print one line a check: what `rlhf check` does. pytest isn't needed."""

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
from rlhf_core.infra.errors import PluginError, printable
from rlhf_core.infra.log import LOGGER, hide_library_bars
from rlhf_core.registry.plugin_logs import plugin_packages
from rlhf_core.testing.contract import Contract, describe_error

Status = Literal["ok", "failed", "expected", "skipped"]


@dataclass(frozen=True)
class Check:
    """How one check ended. `expected` is a failure that was expected; `reason` is empty where it is `ok`."""

    name: str
    status: Status
    reason: str
    seconds: float


def contract_of(kind: str) -> type[Contract]:
    """Return the contract of a kind of plugin."""
    from rlhf_core import testing

    return getattr(testing, f"{kind.capitalize()}Contract")


def run_checks(contract: type[Contract]) -> Iterator[Check]:
    """Run each check of a contract, in order."""
    for name in contract.checks():
        began = time.perf_counter()
        with _quiet(), _one_thread():
            status, reason = _run(contract, name)
        yield Check(name, status, reason, time.perf_counter() - began)


def run_contract(
    kind: str,
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> int:
    """Check a registered plugin, printing a line a check to stdout; return 0, or the exit code of a broken plugin.

    Args:
        kind: `trainer`, `reward`, `sampler`, `merger` or `hook`.
        name: its name in the registry, qualified or not.
        options: options of the method to check it with.
        expected_failures: check → why it fails; one that passes is a failure.

    Raises:
        UnknownPlugin, PluginError: the plugin isn't there or can't be loaded.
        ConfigError: there is no such kind, or no such check.
    """
    kind = registry.parse_kind(kind)
    base = contract_of(kind)
    hide_library_bars()
    registry.get(kind, name)  # what can't be loaded is one error, not a failure of every check
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
    expected = contract.expected_failures.get(name)
    # The mark for pytest is left aside: here the failure itself is looked at.
    test = getattr(contract, name)
    test = getattr(test, "_unmarked", test)
    try:
        test(contract())
    except SkipTest as skip:
        return "skipped", str(skip)
    except Exception as error:
        return ("failed", describe_error(error)) if expected is None else ("expected", expected)
    if expected is not None:
        return "failed", f"passes, and was expected to fail: {expected}"
    return "ok", ""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give torch one thread: tensors this small only wait for others, for minutes where the machine is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the runs' own reports out of the way."""
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
