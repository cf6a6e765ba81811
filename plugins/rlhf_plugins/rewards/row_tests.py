"""The tests of a row: which parts of their source are tests, how each is run, and pairs of input and output."""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.plugin import shortened

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_CHECKS = re.compile(r"assert|check|verify|expect|fail|raises$|warns$")
"""Beginnings of the names of functions that are there to fail, in libraries of tests."""


@dataclass(frozen=True)
class RowTests:
    """The tests of a row: either pieces of source, of which some count, or pairs of input and output."""

    pieces: Sequence[tuple[str, bool]] = ()
    """(source, whether it is a test or only needed by tests)."""
    pairs: Sequence[tuple[str, str]] = ()
    imports: Sequence[str] = ()
    """Names that may be modules that the tests use."""


def read_tests(value: Any, entry_point: Any = None) -> RowTests:
    """Return a row's tests.

    Args:
        value: source, a list of sources, or pairs of input and output, also as JSON text.
        entry_point: the name that a function `check(candidate)` of the tests is called with, as in HumanEval.

    Raises:
        ValueError: it is none of these, checks nothing, or needs what only pytest does.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # Python source may begin like this, too
            value = json.loads(value)
    if isinstance(value, str):
        sources = [_Source(value, entry_point)]
        pieces = list(sources[0].pieces())
    elif isinstance(value, Mapping):
        return RowTests(pairs=_pairs(value))
    elif isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        sources = [source for one in value if (source := _Source(one, entry_point)).body]
        pieces = [piece for source in sources for piece in source.pieces(whole=True)]
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return RowTests(pairs=[pair for one in value for pair in _pairs(one)])
    else:
        raise ValueError(f"expected source, a list of sources, or inputs with outputs; got {shortened(value)}")
    if not any(counts for _, counts in pieces):
        raise ValueError(
            "they check nothing: nothing in them can fail, such as an assert, or a function or method `test_…`"
        )
    return RowTests(pieces=pieces, imports=sorted({name for source in sources for name in source.imports()}))


def text_of(value: Any) -> str:
    """Return a text; a list of lines as one text, and nothing as ''."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return value if isinstance(value, str) else str(value)


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{error}; got {shortened(source)}") from None


_RUN_CASE = """
def _run_test():
    import sys, unittest
    skips = []
    class Result(unittest.TestResult):
        def addSkip(self, test, reason):
            super().addSkip(test, reason)
            skips.append(sys.exc_info()[1] or unittest.SkipTest(reason))
    result = Result()
    unittest.TestSuite([{owner}({name!r})]).run(result)
    if not result.wasSuccessful() or not (skips or result.testsRun == 1):
        raise AssertionError
    for earlier, later in zip(skips, skips[1:]):
        later.__cause__ = earlier
    if skips:
        raise skips[-1]
_run_test()
"""
"""Runs one method of a `unittest.TestCase` with what is set up around it; one that is skipped raises what skipped it."""

_RUN_TEST = """
def _run_test():
    import inspect, unittest
    owner = {owner}
    one = owner() if owner else None
    test = getattr(one, {name!r}) if owner else {name}
    for mark in [*getattr(owner, "pytestmark", ()), *getattr(test, "pytestmark", ())]:
        # A condition that is a text, which pytest would evaluate, counts as met.
        if mark.name == "skip" or (mark.name == "skipif" and any(mark.args)):
            raise unittest.SkipTest
    if getattr(owner, "__unittest_skip__", False):
        raise unittest.SkipTest
    def around(name):
        function = getattr(one, name, None)
        if function is not None:
            arguments = (owner if name.endswith("class") else test,)
            function(*arguments[:len(inspect.signature(function).parameters)])
    around("setup_class")
    try:
        around("setup_method")
        try:
            done = test()
            if inspect.iscoroutine(done):
                import asyncio
                asyncio.run(done)
        finally:
            around("teardown_method")
    finally:
        around("teardown_class")
_run_test()
"""
"""Runs a function `test_…`, or a method of a class `Test…`, as pytest does without fixtures and parameters."""


class _Source:
    """One source of tests: what it defines and imports, what of it can fail, and what runs each of its tests."""

    def __init__(self, text: str, entry_point: Any) -> None:
        self.text, self.entry_point = text, entry_point
        self.tree = _parsed(text)
        self.body = [inner for statement in self.tree.body for inner in _as_script(statement)]
        self.imported = dict(_imported(self.tree))
        nodes = list(ast.walk(self.tree))
        self.called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        self.used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        self.classes = {n.name: n for n in self.body if isinstance(n, ast.ClassDef)}
        self.defined = {n.name: n for n in nodes if isinstance(n, _Function | ast.ClassDef)}
        self.failing: set[str] = set()
        while more := {name for name, n in self.defined.items() if name not in self.failing and self.calling_fails(n)}:
            self.failing |= more  # and so does what calls them

    def name(self, node: ast.expr) -> str:
        """Return the dotted name of a decorator, base or called function, through the imports."""
        parts = ast.unparse(node.func if isinstance(node, ast.Call) else node).split(".")
        return ".".join([self.imported.get(parts[0], parts[0]), *parts[1:]])

    def calling_fails(self, node: _Function | ast.ClassDef) -> bool:
        """Tell whether calling a function, or making an object of a class, checks something."""
        if isinstance(node, ast.ClassDef):
            return any(
                isinstance(one, _Function) and one.name == "__init__" and self.can_fail(one) for one in node.body
            )
        return self.can_fail(node)

    def can_fail(self, statement: ast.AST) -> bool:
        """Tell whether a statement checks something: an assert, a raise, or a call of what checks."""
        for node in ast.walk(statement):
            if isinstance(node, ast.Raise) or (isinstance(node, ast.Assert) and not _always_true(node.test)):
                return True
            if isinstance(node, ast.Call):
                last = self.name(node).rpartition(".")[2]
                if last in self.failing or (last not in self.defined and _CHECKS.match(last)):
                    return True
        return False

    def counts(self, statement: ast.stmt) -> bool:
        """Tell whether a statement of the module is a test: it checks, or calls a function that is defined elsewhere."""
        if isinstance(statement, _Function | ast.ClassDef | ast.Import | ast.ImportFrom):
            return False
        function = (
            statement.value.func if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) else None
        )
        elsewhere = isinstance(function, ast.Name) and not (
            function.id in self.defined or function.id in self.imported or hasattr(builtins, function.id)
        )
        return elsewhere or self.can_fail(statement)

    def pieces(self, whole: bool = False) -> Iterator[tuple[str, bool]]:
        """Yield the parts of the source in the order in which they run, each with whether it is a test.

        Args:
            whole: a source without test functions and methods is one test.
        """
        calls = list(self.calls())
        if whole and not calls:
            yield self.text, any(map(self.counts, self.body))
            return
        for statement in self.body:
            call = (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and self.name(statement.value)
            )
            if call not in ("unittest.main", "pytest.main"):  # would run them all as one test, and may end the process
                yield ast.unparse(statement), self.counts(statement)
        for text in calls:
            yield text, True

    def calls(self) -> Iterator[str]:
        """Yield what runs each function and method that is a test: those that nothing else calls.

        Raises:
            ValueError: one of them needs pytest's fixtures or parameters.
        """
        cases = [name for name in self.classes if self.is_case(name)]
        mixed_in = {base for name in cases for base in self.bases(name)}
        for node in self.body:
            self.refuse_pytest(node)
            if isinstance(node, _Function) and node.name not in self.called:
                point = self.entry_point
                if node.name == "check" and isinstance(point, str) and point.isidentifier():
                    yield f"check({point})"
                elif (
                    node.name.startswith("test")
                    and self.is_test(node)
                    and not self.is_helper(node, node.name in self.used)
                ):
                    yield _RUN_TEST.format(owner=None, name=node.name)
            elif isinstance(node, ast.ClassDef) and not self.is_skipped(node):
                methods = self.methods(node.name)
                case = node.name in cases
                if not case and (not node.name.startswith("Test") or node.name in mixed_in or "__init__" in methods):
                    continue
                for name, method in methods.items():
                    if name.startswith("test") and self.is_test(method) and (case or not self.is_helper(method, False)):
                        yield (_RUN_CASE if case else _RUN_TEST).format(owner=node.name, name=name)

    def bases(self, name: str) -> list[str]:
        """Return all classes of the source that a class inherits from."""
        direct = [
            base for node in self.classes[name].bases if (base := ast.unparse(node)) in self.classes and base != name
        ]
        return [*direct, *(far for base in direct for far in self.bases(base))]

    def is_case(self, name: str) -> bool:
        """Tell whether a class inherits from `unittest.TestCase`, also through other classes of the source."""
        every = [base for one in (name, *self.bases(name)) for base in self.classes[one].bases]
        return any(self.name(base).rpartition(".")[2] in ("TestCase", "IsolatedAsyncioTestCase") for base in every)

    def methods(self, name: str) -> dict[str, _Function]:
        """Return a class's methods, inherited ones included."""
        found: dict[str, _Function] = {}
        for base in reversed(self.classes[name].bases):
            if (inherited := ast.unparse(base)) in self.classes and inherited != name:
                found |= self.methods(inherited)
        for node in self.classes[name].body:
            if isinstance(node, _Function):
                found[node.name] = node
            elif isinstance(node, ast.Assign):  # `test_inherited = None` removes it
                for target in node.targets:
                    found.pop(ast.unparse(target), None)
        return found

    def is_test(self, node: _Function) -> bool:
        """Tell whether a function `test…` runs anything that may fail."""
        called = {self.name(one) for one in ast.walk(node) if isinstance(one, ast.Call)}
        return not self.is_skipped(node) and (self.can_fail(node) or bool(called - {"print"}))

    def is_skipped(self, node: _Function | ast.ClassDef) -> bool:
        """Tell whether a test is always skipped, so that it counts nowhere."""
        return any(self.name(one) in ("unittest.skip", "pytest.mark.skip") for one in node.decorator_list)

    def is_helper(self, node: _Function, used: bool) -> bool:
        """Tell whether a function `test…` is one that others give its arguments.

        Raises:
            ValueError: it isn't, and pytest would give it fixtures.
        """
        if node.decorator_list:  # which may give it arguments, as `unittest.mock.patch` does
            return False
        given = [one.arg for one in (*node.args.posonlyargs, *node.args.args)][: -len(node.args.defaults) or None]
        given = [one for one in given if one not in ("self", "cls")]
        if given and not used:
            raise ValueError(
                f"`{node.name}` has the parameter `{given[0]}`, which pytest would fill with a fixture: fixtures aren't run here;"
                " write what it needs into the test"
            )
        return bool(given)

    def refuse_pytest(self, statement: ast.stmt) -> None:
        """Raise ValueError where pytest's parameters, fixtures or expected failures are asked for."""
        for node in ast.walk(statement):
            if not isinstance(node, _Function | ast.ClassDef):
                continue
            for one in node.decorator_list:
                _, module, name = self.name(one).rpartition("pytest.")
                if module and name in ("mark.parametrize", "mark.usefixtures", "mark.xfail", "fixture"):
                    raise ValueError(
                        f"`{node.name}` uses `pytest.{name}`, which isn't run here; write its cases as asserts of one test, or as"
                        " functions and methods `test_…` without parameters"
                    )

    def imports(self) -> Iterator[str]:
        """Yield every name that may be a module that the tests use, such as `numpy` and `numpy.testing` for an assert of it."""
        chains = [self.name(node) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)]
        known = {name.partition(".")[0] for name in self.imported.values()}
        dotted = [one for one in chains if one.partition(".")[0] in known and re.fullmatch(r"[\w.]+", one)]
        loaded = [one.name for node in ast.walk(self.tree) if isinstance(node, ast.Import) for one in node.names]
        if any(self.calls()):
            loaded += ["inspect", "unittest"]
        if "async" in self.text.casefold():
            loaded += ["asyncio", "unittest.async_case"]
        for name in (*loaded, *self.imported.values(), *dotted):
            parts = name.split(".")
            yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _as_script(statement: ast.stmt) -> list[ast.stmt]:
    """Return a statement, or the statements that run where the file is a script."""
    guard = isinstance(statement, ast.If) and ast.unparse(statement.test) in (
        "__name__ == '__main__'",
        "'__main__' == __name__",
    )
    return statement.body if guard and isinstance(statement, ast.If) else [statement]


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each imported name with the dotted name that it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                yield (one.asname, one.name) if one.asname else (one.name.partition(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for one in node.names:
                yield one.asname or one.name, f"{node.module}.{one.name}"


def _always_true(test: ast.expr) -> bool:
    """Tell whether an assert is of a constant, such as `assert True` or `assert (x == 1, "…")`."""
    return bool((isinstance(test, ast.Constant) and test.value) or (isinstance(test, ast.Tuple) and test.elts))


def _pairs(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return pairs of input and output: one of a mapping with `input` and `output`, several of one with lists of them."""
    for names in (("input", "output"), ("inputs", "outputs")):
        if {*names} <= value.keys():
            given, expected = (value[name] for name in names)
            if isinstance(given, list) and isinstance(expected, list) and names[0] == "inputs":
                if len(given) != len(expected) or not given:
                    raise ValueError(f"{len(given)} inputs for {len(expected)} outputs")
                return list(zip(map(text_of, given), map(text_of, expected), strict=True))
            return [(text_of(given), text_of(expected))]
    raise ValueError(f"expected `input` and `output`; got {', '.join(map(str, value)) or 'nothing'}")
