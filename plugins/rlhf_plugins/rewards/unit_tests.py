"""Whether code that the model wrote passes its row's tests, run in a process of its own under limits."""

from __future__ import annotations

import logging
import os
import re
import textwrap
import time
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import BaseConfig, CodeLimits, RewardFn, Sample, SampleError, column_of, run_untrusted
from rlhf_plugins.rewards.row_tests import RowTests, read_tests, text_of

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*(?:```|~~~)[ \t]*$", re.MULTILINE | re.DOTALL)
_PYTHON = {"", "python", "py", "python3"}


class UnitTestsConfig(BaseConfig):
    """Options of the reward by unit tests."""

    allow_code_execution: bool = Field(
        False,
        description="Must be true: the reward runs code that a model wrote, on this machine, as this user. What it replaces in"
        " unittest and other modules is set back before the tests, but asserts run in its process: code that inspects it,"
        " or changes other modules while a test calls it, can still forge them. Pairs of input and output can't be forged.",
    )
    column: str = Field(
        "tests",
        min_length=1,
        description="Column of the tests: Python source with asserts, functions `test_…`, or classes (`unittest.TestCase`, or"
        " `Test…` as in pytest) of which each method is a test; a list of such; or pairs of input and output (a list of"
        " `{input, output}`, or `{inputs: [...], outputs: [...]}`); also as JSON text. A path such as `info.tests` leads into"
        " nested columns. pytest's fixtures and parameters aren't run.",
    )
    setup_column: str | None = Field(
        None, description="Column of source that runs before the code, such as imports; null runs nothing."
    )
    code: Literal["block", "whole"] = Field(
        "block", description="What of a completion is run: its last ```python block, or the `whole` text."
    )
    score: Literal["share", "all"] = Field(
        "share", description="The share of the tests that pass, or 1 where `all` do and else 0."
    )
    no_code_score: float = Field(0.0, description="Score of a completion without code; smaller punishes more.")
    seconds: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Time limit of one process: of all asserts, or of one input; larger allows slower code.",
    )
    total_seconds: float = Field(
        60.0,
        gt=0,
        description="Time limit of all processes for one completion; larger lets more slow tests run. The rest fail.",
    )
    memory_mb: int = Field(512, ge=64, description="Most memory of the process in MiB; larger allows more.")
    file_mb: int = Field(16, ge=0, description="Largest file that it may write in MiB; larger fills more of the disk.")
    output_kb: int = Field(256, ge=1, description="Most output that is read in KiB; code that prints more fails.")

    @model_validator(mode="after")
    def _asked_for(self) -> UnitTestsConfig:
        if not self.allow_code_execution:
            raise ValueError(
                "this reward runs code that a model wrote, which its limits don't make safe: set `allow_code_execution: true`"
                " to run it, best in a container or virtual machine without secrets"
            )
        return self


class UnitTestsReward(RewardFn):
    """Scores code by the share of its row's tests that it passes, in a separate process with limits."""

    api = 1
    Config = UnitTestsConfig
    config: UnitTestsConfig
    by_row = True
    runs_in: Literal["main", "thread", "process"] = "thread"  # which waits for the process that computes
    concurrency = os.cpu_count()
    _said_skipped = False

    def prepare(self) -> None:
        """Warn once of what the limits can't contain, and of those that this system lacks."""
        limits = CodeLimits(seconds=10.0)
        enforced = run_untrusted([("probe", "pass")], limits).enforced
        lacking = [name for name in ("network", "processes", "files") if not enforced.get(name)]
        missing = (
            f"; this system doesn't keep it from {', '.join(lacking)}: Python's own functions for that are refused, code that"
            " calls the system itself isn't kept from it"
            if lacking
            else ""
        )
        log.warning(
            "unit_tests runs code that a model wrote, as this user, with limits on time, memory, files, processes and network."
            " That stops accidents and the usual tricks, not code that attacks the kernel, fills the disk with many files or"
            " inspects its own tests: use a container or virtual machine without secrets%s",
            missing,
        )

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return for each completion the share of its row's tests that pass.

        Raises:
            SampleError: a row has no tests, or tests that can't be read.
        """
        return [self._score(number, sample) for number, sample in enumerate(samples)]

    def _score(self, number: int, sample: Sample) -> float:
        config = self.config
        given = column_of(sample, config.column, number)
        setup = (
            ""
            if config.setup_column is None
            else text_of(column_of(sample, config.setup_column, number, option="setup_column"))
        )
        try:
            tests = read_tests(given, sample.columns.get("entry_point"))
        except ValueError as error:
            raise SampleError(f"the tests in `{config.column}` can't be read: {error}", sample=number) from None
        code = sample.completion if config.code == "whole" else last_block(sample.completion)
        if code is None or not code.strip():
            return config.no_code_score
        passed, count = self._paired(setup, code, tests) if tests.pairs else self._asserted(setup, code, tests)
        if not count:
            self._say_skipped()
            return 0.0
        return passed / count if config.score == "share" else float(passed == count)

    def _say_skipped(self) -> None:
        """Warn once of rows of which no test runs."""
        if not self._said_skipped:
            self._said_skipped = True
            log.warning(
                "unit_tests: every test of a row skipped itself, so that its completions get 0; check the rows' skip conditions"
            )

    @property
    def _limits(self) -> CodeLimits:
        config = self.config
        return CodeLimits(config.seconds, config.memory_mb << 20, config.file_mb << 20, config.output_kb << 10)

    def _paired(self, setup: str, code: str, tests: RowTests) -> tuple[int, int]:
        """Return how many inputs lead to their outputs, in a process each, and how many there are."""
        program = [("program.py", f"{setup}\n{code}" if setup else code)]
        passed, began = 0, time.monotonic()
        for number, (given, expected) in enumerate(tests.pairs):
            late = time.monotonic() - began > self.config.total_seconds
            if late or (self.config.score == "all" and passed < number):
                break
            run = run_untrusted(program, self._limits, stdin=given.encode())
            passed += run.returncode == 0 and _lines(run.output.decode(errors="replace")) == _lines(expected)
        return passed, len(tests.pairs)

    def _asserted(self, setup: str, code: str, tests: RowTests) -> tuple[int, int]:
        """Return how many tests pass, and how many there are without those that skip themselves.

        After one that ends the process the others run in another.
        """
        before = [("setup.py", setup), ("imports.py", _LOAD.format(names=tuple(tests.imports))), ("program.py", code)]
        counted = {number for number, (_, counts) in enumerate(tests.pieces) if counts}
        passed: set[int] = set()
        skipped: set[int] = set()
        left, began = list(range(len(tests.pieces))), time.monotonic()
        while counted & {*left} and time.monotonic() - began < self.config.total_seconds:
            pieces = [*before, *((f"test_{number}.py", tests.pieces[number][0]) for number in left)]
            run = run_untrusted(pieces, self._limits, needed=len(before), undo=len(before) - 1)
            if run.reached < len(before) or not {*range(len(before))} <= run.passed:
                break  # the code itself fails
            passed |= {left[at - len(before)] for at in run.passed if at >= len(before)}
            skipped |= {left[at - len(before)] for at in run.skipped if at >= len(before)}
            ended = run.reached - len(before)
            if ended >= len(left) or self.config.score == "all":
                break
            # Of those that ran, what other tests need runs again.
            left = [n for at, n in enumerate(left) if at > ended or (at < ended and n not in counted)]
        return len(passed & counted), len(counted - skipped)


_LOAD = """
for _name in {names!r}:
    try:
        __import__(_name)
    except BaseException:
        pass
"""
"""Loads what the tests use before the code runs, so that what the code changes in it is known, and can be set back."""


def last_block(text: str) -> str | None:
    """Return the last closed code block that is Python or names no language; None where there is none."""
    blocks = [body for language, body in _BLOCK.findall(text) if language.casefold() in _PYTHON]
    return textwrap.dedent(blocks[-1]) if blocks else None


def _lines(text: str) -> list[str]:
    """Return the lines of an output, without white space at their ends and empty lines at its end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
