"""Whether code that the model wrote passes its row's tests, run in a process of its own under limits."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from rlhf_core.plugin import BaseConfig, CodeLimits, RewardFn, Sample, SampleError, column_of, run_untrusted, shortened

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*(?:```|~~~)[ \t]*$", re.MULTILINE | re.DOTALL)
_PYTHON = {"", "python", "py", "python3"}


class UnitTestsConfig(BaseConfig):
    """Options of the reward by unit tests."""

    allow_code_execution: bool = Field(
        False, description="Must be true: the reward runs code that a model wrote, on this machine, as this user."
    )
    column: str = Field(
        "tests",
        min_length=1,
        description="Column of the tests: Python source with asserts, functions `test_…` or `unittest.TestCase` classes, of which"
        " each method is a test; a list of such; or pairs of input and output (a list of"
        " `{input, output}`, or `{inputs: [...], outputs: [...]}`); also as JSON text. A path such as `info.tests` leads into"
        " nested columns.",
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


@dataclass(frozen=True)
class _Tests:
    """The tests of a row: either pieces of source, of which some count, or pairs of input and output."""

    pieces: Sequence[tuple[str, bool]] = ()
    """(source, whether it is a test or only needed by tests)."""
    pairs: Sequence[tuple[str, str]] = ()


class UnitTestsReward(RewardFn):
    """Scores code by the share of its row's tests that it passes, in a separate process with limits."""

    api = 1
    Config = UnitTestsConfig
    config: UnitTestsConfig
    by_row = True
    runs_in: Literal["main", "thread", "process"] = "thread"  # which waits for the process that computes
    concurrency = os.cpu_count()

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
        setup = "" if config.setup_column is None else _source(column_of(sample, config.setup_column, number))
        try:
            tests = read_tests(given, sample.columns.get("entry_point"))
        except ValueError as error:
            raise SampleError(f"the tests in `{config.column}` can't be read: {error}", sample=number) from None
        code = sample.completion if config.code == "whole" else last_block(sample.completion)
        if code is None or not code.strip():
            return config.no_code_score
        passed, count = self._paired(setup, code, tests) if tests.pairs else self._asserted(setup, code, tests)
        return passed / count if config.score == "share" else float(passed == count)

    @property
    def _limits(self) -> CodeLimits:
        config = self.config
        return CodeLimits(config.seconds, config.memory_mb << 20, config.file_mb << 20, config.output_kb << 10)

    def _paired(self, setup: str, code: str, tests: _Tests) -> tuple[int, int]:
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

    def _asserted(self, setup: str, code: str, tests: _Tests) -> tuple[int, int]:
        """Return how many tests pass, and how many there are. After one that ends the process the others run in another."""
        before = [("setup.py", setup), ("program.py", code)]
        counted = {number for number, (_, counts) in enumerate(tests.pieces) if counts}
        passed: set[int] = set()
        left, began = list(range(len(tests.pieces))), time.monotonic()
        while counted & {*left} and time.monotonic() - began < self.config.total_seconds:
            pieces = [*before, *((f"test_{number}.py", tests.pieces[number][0]) for number in left)]
            run = run_untrusted(pieces, self._limits, needed=len(before))
            if run.reached < len(before) or not {0, 1} <= run.passed:
                break  # the code itself fails
            passed |= {left[at - len(before)] for at in run.passed if at >= len(before)}
            ended = run.reached - len(before)
            if ended >= len(left) or self.config.score == "all":
                break
            # Of those that ran, what other tests need runs again.
            left = [n for at, n in enumerate(left) if at > ended or (at < ended and n not in counted)]
        return len(passed & counted), len(counted)


def last_block(text: str) -> str | None:
    """Return the last closed code block that is Python or names no language; None where there is none."""
    blocks = [body for language, body in _BLOCK.findall(text) if language.casefold() in _PYTHON]
    return textwrap.dedent(blocks[-1]) if blocks else None


def read_tests(value: Any, entry_point: Any = None) -> _Tests:
    """Return a row's tests.

    Args:
        value: source, a list of sources, or pairs of input and output, also as JSON text.
        entry_point: the name that a function `check(candidate)` of the tests is called with, as in HumanEval.

    Raises:
        ValueError: it is none of these, or checks nothing.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # Python source may begin like this, too
            value = json.loads(value)
    if isinstance(value, str):
        pieces = list(_pieces(value, entry_point))
    elif isinstance(value, Mapping):
        return _Tests(pairs=_pairs(value))
    elif isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        pieces = [
            piece
            for one in value
            if (tree := _parsed(one)).body
            for piece in (_pieces(one, entry_point) if _test_cases(tree) else [(one, True)])
        ]
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return _Tests(pairs=[pair for one in value for pair in _pairs(one)])
    else:
        raise ValueError(f"expected source, a list of sources, or inputs with outputs; got {shortened(value)}")
    if not any(counts for _, counts in pieces):
        raise ValueError("they check nothing: there is no assert and no call")
    return _Tests(pieces=pieces)


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{error}; got {shortened(source)}") from None


def _pieces(source: str, entry_point: Any) -> Iterator[tuple[str, bool]]:
    """Yield the statements of a test's source: those that assert or call something count as tests.

    Functions `test_…` that nothing calls are called, `check` with the entry point, and so is each method of a `TestCase`.
    """
    tree = _parsed(source)
    cases = _test_cases(tree)
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {function.id for function in functions if isinstance(function, ast.Name)}
    calls = []
    for statement in tree.body:
        text = ast.unparse(statement)
        if cases and text.startswith("unittest.main("):  # would run them all as one test, and end the process
            continue
        defines = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(statement))
        call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        yield text, not defines and (asserts or call)
        if isinstance(statement, ast.FunctionDef) and statement.name not in called:
            if statement.name == "check" and isinstance(entry_point, str) and entry_point.isidentifier():
                calls.append(f"check({entry_point})")
            elif statement.name.startswith("test") and not statement.args.args:
                calls.append(f"{statement.name}()")
    for text in calls:
        yield text, True
    for case, methods in cases.items():
        for method in methods:
            yield _RUN_METHOD.format(case=case, method=method), True


_RUN_METHOD = """
from unittest import TestResult as _TestResult, TestSuite as _TestSuite
_found = _TestResult()
_TestSuite([{case}({method!r})]).run(_found)
assert _found.wasSuccessful() and _found.testsRun == 1 and not _found.skipped
"""
"""Runs one method of a `unittest.TestCase` with what is set up around it. One that is skipped as it runs hasn't passed."""


def _test_cases(tree: ast.Module) -> dict[str, list[str]]:
    """Return the `unittest.TestCase` classes of a source, each with its methods that are tests, inherited ones included."""
    found: dict[str, list[str]] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.ClassDef) or _skipped(statement):
            continue
        bases = [ast.unparse(base).rpartition(".")[2] for base in statement.bases]
        if not any(base in found or base in ("TestCase", "IsolatedAsyncioTestCase") for base in bases):
            continue
        methods = [node for node in statement.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        own = [node.name for node in methods if node.name.startswith("test") and not _skipped(node)]
        defined = {node.name for node in methods}
        inherited = [name for base in bases for name in found.get(base, ()) if name not in defined]
        found[statement.name] = [*dict.fromkeys([*inherited, *own])]
    return {name: methods for name, methods in found.items() if methods}


def _skipped(statement: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a test is always skipped, so that it counts nowhere."""
    names = (ast.unparse(one.func if isinstance(one, ast.Call) else one) for one in statement.decorator_list)
    return any(name in ("skip", "unittest.skip") for name in names)


def _pairs(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return pairs of input and output: one of a mapping with `input` and `output`, several of one with lists of them."""
    for names in (("input", "output"), ("inputs", "outputs")):
        if {*names} <= value.keys():
            given, expected = (value[name] for name in names)
            if isinstance(given, list) and isinstance(expected, list) and names[0] == "inputs":
                if len(given) != len(expected) or not given:
                    raise ValueError(f"{len(given)} inputs for {len(expected)} outputs")
                return list(zip(map(_source, given), map(_source, expected), strict=True))
            return [(_source(given), _source(expected))]
    raise ValueError(f"expected `input` and `output`; got {', '.join(map(str, value)) or 'nothing'}")


def _source(value: Any) -> str:
    """Return a text; a list of lines as one text, and nothing as ''."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return value if isinstance(value, str) else str(value)


def _lines(text: str) -> list[str]:
    """Return the lines of an output, without white space at their ends and empty lines at its end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
