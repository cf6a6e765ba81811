"""The kit itself: expected failures, what isn't named, lazy imports, and `rlhf check`."""

from __future__ import annotations

import subprocess
import sys
from unittest import SkipTest

import merger_plugins
import pytest

from rlhf_core import registry
from rlhf_core.infra.errors import ConfigError
from rlhf_core.testing import MergerContract, TrainerContract
from rlhf_core.testing.contract import Contract, after, require
from rlhf_core.testing.runner import run_contract

pytest_plugins = ["pytester"]

MODULE = """
from merger_plugins import IgnoresWeights, Linear
from rlhf_core.testing import MergerContract

class TestWrong(MergerContract):
    merger = IgnoresWeights
    expected_failures = {"test_weights_one_and_zero_select": "it averages"}

class TestMended(TestWrong):
    merger = Linear

class TestStrict(TestMended):
    expected_failures = {}
"""


def test_an_expected_failure_that_passes_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(MODULE)
    result = pytester.runpytest_inprocess("-rxf", "-p", "no:cacheprovider")
    count = len(MergerContract.checks())
    result.assert_outcomes(passed=3 * count - 2, xfailed=1, failed=1)
    result.stdout.fnmatch_lines(["XFAIL *TestWrong::test_weights_one_and_zero_select - it averages"])
    result.stdout.fnmatch_lines(["FAILED *TestMended::test_weights_one_and_zero_select*"])


def test_an_expected_failure_is_named_rightly() -> None:
    with pytest.raises(ConfigError, match="there is no check `test_order_of_model`") as caught:
        type("Wrong", (MergerContract,), {"expected_failures": {"test_order_of_model": "?"}})
    assert caught.value.exit_code == 2
    assert "did you mean `test_order_of_models_changes_nothing`?" in str(caught.value)


def test_something_must_be_named() -> None:
    class Nothing(TrainerContract):
        pass

    with pytest.raises(
        ConfigError, match=r"no trainer to test; .*set `method` to the name of a trainer, or `trainer` to a class"
    ):
        Nothing().test_record_and_roles_are_known()


def test_a_wrong_option_is_named() -> None:
    class Wrong(TrainerContract):
        method = "dpo"
        options = {"betta": 0.1}  # noqa: RUF012

    with pytest.raises(ConfigError, match="unknown option `betta`") as caught:
        Wrong().build()
    assert "Wrong.options" in str(caught.value) and "did you mean `beta`?" in str(caught.value)


def test_one_fault_is_reported_once() -> None:
    class Chain(Contract):
        def test_first(self) -> None:
            require(False, "the root")

        @after("test_first")
        def test_second(self) -> None:
            raise RuntimeError("never reached")

        @after("test_second")
        def test_third(self) -> None:
            raise RuntimeError("never reached")

    for name in ("test_second", "test_third"):
        with pytest.raises(SkipTest, match=r"^test_first fails: the root$"):
            getattr(Chain(), name)()


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, rlhf_core.testing as kit; from rlhf_core.testing import arithmetic_task;"
        "assert 'torch' not in sys.modules and 'pytest' not in sys.modules;"
        "kit.TrainerContract, kit.RewardContract, kit.SamplerContract, kit.MergerContract;"
        "assert 'pytest' not in sys.modules; assert set(dir(kit)) == set(kit.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_check_prints_one_line_per_check(capsys: pytest.CaptureFixture[str]) -> None:
    registry.register("merger", "sum", merger_plugins.Linear)
    assert run_contract("mergers", "sum") == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == MergerContract.checks()
    assert all(line.startswith("ok ") for line in lines)
    assert summary.startswith(f"merger sum: {len(lines)} ok in ")


def test_check_reports_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    registry.register("merger", "average", merger_plugins.IgnoresWeights)
    assert run_contract("merger", "average") == 5
    out = capsys.readouterr().out
    (failed,) = (line for line in out.splitlines() if line.startswith("failed"))
    assert "test_weights_one_and_zero_select: with the weights [1.0, 0.0, 0.0]: the merged tensor is off by" in failed
    assert "1 failed" in out.splitlines()[-1]


def test_check_knows_expected_failures(capsys: pytest.CaptureFixture[str]) -> None:
    registry.register("merger", "average", merger_plugins.IgnoresWeights)
    name = "test_weights_one_and_zero_select"
    assert run_contract("merger", "average", expected_failures={name: "it averages"}) == 0
    assert f"{name}: it averages" in capsys.readouterr().out
    registry.register("merger", "sum", merger_plugins.Linear)
    assert run_contract("merger", "sum", expected_failures={name: "it averages"}) == 5
    assert f"{name}: passes, but was expected to fail: it averages" in capsys.readouterr().out


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown kind of plugin `optimiser`") as caught:
        run_contract("optimiser", "any")
    assert caught.value.exit_code == 2
    with pytest.raises(registry.UnknownPlugin, match=r"unknown trainer `dop`.*did you mean `dpo`"):
        run_contract("trainer", "dop")
