"""Which checks of a contract fail for a plugin with a planted fault, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rlhf_core.testing.contract import Contract, MethodContract
from rlhf_core.testing.runner import run_checks

Faults = Mapping[type, Mapping[str, str]]
"""Broken plugin → the checks that must catch it, each with a pattern of its message."""


def contract_of(base: type[Contract], plugin: object, **members: object) -> type[Contract]:
    """Return a contract that tests a class or function, with other attributes of the contract."""
    return type("Contract", (base,), {base.kind: plugin, **members})


def assert_caught(contract: type[Contract], expected: Mapping[str, str]) -> None:
    """Fail unless these checks fail, with messages that match their patterns, and no others."""
    failed = {check.name: check.reason for check in run_checks(contract) if check.status == "failed"}
    assert failed.keys() == expected.keys(), failed
    for name, pattern in expected.items():
        assert re.search(pattern, failed[name]), failed[name]


def assert_every_check_can_fail(contract: type[Contract], faults: Faults) -> None:
    """Fail unless each check of a contract, but for those of every method's contract, catches one of the faults."""
    shared = {name for name in vars(MethodContract) if name.startswith("test_")}
    assert {name for checks in faults.values() for name in checks} == set(contract.checks()) - shared
