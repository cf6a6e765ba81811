"""Code that a model wrote: right code passes, wrong code fails, and hostile code neither passes nor does harm."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from rlhf_plugins.rewards import unit_tests
from rlhf_plugins.rewards.row_tests import read_tests
from rlhf_plugins.rewards.unit_tests import UnitTestsConfig, last_block

from rlhf_core.contracts.reward import Sample
from rlhf_core.infra import untrusted_code
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.infra.untrusted_code import CodeLimits, CodeRun, run_untrusted
from rlhf_core.rewards import open_rewards
from rlhf_core.testing import RewardContract

ASSERTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0", "assert add(5, 5) == 10"]
RIGHT = "def add(a, b):\n    return a + b\n"


def block(code: str) -> str:
    return f"Here it is:\n\n```python\n{code}\n```\nDone."


def score(code: str, tests: Any = ASSERTS, **options: Any) -> float:
    columns = options.pop("columns", {})
    how = {"allow_code_execution": True, "seconds": 3, **options}
    rewards = open_rewards([{"name": "unit_tests", "options": how}])
    return rewards.score([Sample("p", block(code), columns={"tests": tests, **columns})]).by_name["unit_tests"][0]


# Off unless asked for, with one warning


def test_it_is_off_unless_it_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"runs code that a model wrote.*`allow_code_execution: true`"):
        open_rewards(["unit_tests"])


def test_what_it_cannot_contain_is_said_once(caplog: Any) -> None:
    rewards = open_rewards([{"name": "unit_tests", "options": {"allow_code_execution": True}}])
    for _ in range(2):
        rewards.score([Sample("p", block(RIGHT), columns={"tests": ASSERTS})])
    told = [one.getMessage() for one in caplog.records if "unit_tests" in one.getMessage()]
    assert len(told) == 1 and "inspects its own tests" in told[0] and "container or virtual machine" in told[0]


def test_the_warning_names_what_the_system_does_not_refuse(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = CodeRun(enforced={"network": True, "processes": True, "files": False})
    monkeypatch.setattr(unit_tests, "run_untrusted", lambda *_: probed)
    open_rewards([{"name": "unit_tests", "options": {"allow_code_execution": True}}]).prepare()
    assert (
        "this system doesn't keep it from files: Python's own functions for that are refused, code that calls"
        in caplog.text
    )


# Verdicts


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (RIGHT, 1.0),
        ("def add(a, b):\n    return abs(a) + b", 0.75),
        ("def add(a, b):\n    return 1 / a and a + b", 0.75),
        ("def add(a, b)\n    return a + b", 0.0),
        ("def sub(a, b):\n    return a - b", 0.0),
        ("raise ValueError", 0.0),
        ("import dataclasses, asyncio, threading, re\nfrom __future__ import annotations", 0.0),
        ("from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n" + RIGHT, 1.0),
        (RIGHT + "if __name__ == '__main__':\n    print(add(*map(int, input().split())))", 1.0),
        ("import threading\n" + RIGHT + "t = threading.Thread(target=print); t.start(); t.join()", 1.0),
        ("open('note.txt', 'w').write('5')\ndef add(a, b):\n    return a + b + 0 * int(open('note.txt').read())", 1.0),
    ],
)  # fmt: skip
def test_the_share_of_asserts_that_pass(code: str, expected: float) -> None:
    assert score(code) == expected
    assert score(code, score="all") == float(expected == 1.0)


def test_tests_of_every_form() -> None:
    source = "import math\ncases = [(1, 2, 3)]\nfor a, b, c in cases:\n    assert add(a, b) == c\nassert add(1, 1) == 3"
    assert score(RIGHT, source) == 0.5
    assert score(RIGHT, json.dumps(ASSERTS)) == 1.0
    assert score(RIGHT, "def test_a():\n    assert add(1, 1) == 2\ndef test_b():\n    assert add(1, 1) == 3") == 0.5
    human_eval = "METADATA = {}\ndef check(candidate):\n    assert candidate(1, 2) == 3"
    assert score(RIGHT, human_eval, columns={"entry_point": "add"}) == 1.0
    assert score("def add(a, b): return 0", human_eval, columns={"entry_point": "add"}) == 0.0
    assert score("def add(a, b): return Z + a + b", ASSERTS, columns={"before": "Z = 0"}, setup_column="before") == 1.0
    assert score(RIGHT, [], columns={"info": {"t": ASSERTS}}, column="info.t") == 1.0


def test_programs_that_read_and_print() -> None:
    program = "a, b = map(int, input().split())\nprint(a + b)"
    pairs = [{"input": "1 2\n", "output": "3"}, {"input": "2 2", "output": "4 \n\n"}, {"input": "0 0", "output": "1"}]
    assert score(program, pairs) == pytest.approx(2 / 3)
    assert score(program, {"inputs": ["1 2", "3 4"], "outputs": ["3\n", "7\n"]}) == 1.0
    assert score(program, json.dumps({"inputs": [["1 2"]], "outputs": [["3"]]})) == 1.0
    assert score(program + "\nraise SystemExit(1)", pairs) == 0.0  # its own exit code says that it failed
    assert score("print(3)", pairs, score="all") == 0.0


PARAMETERS = """
import pytest
@pytest.mark.parametrize("a,b,c", [(1, 2, 3)])
def test_add(a, b, c):
    assert add(a, b) == c
"""


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("x = 1", "they check nothing"),
        ("assert (", "was never closed"),
        (3, "expected source, a list of sources, or inputs with outputs; got 3"),
        ([], "expected source"),
        ("assert True\nprint(add(1, 2))", "nothing in them can fail"),
        (["def helper(a):\n    assert a"], "nothing in them can fail"),
        (PARAMETERS, "`test_add` uses `pytest.mark.parametrize`, which isn't run here"),
        (
            "import pytest\n@pytest.fixture\ndef one():\n    return 1\ndef test_a(one): assert add(1, one) == 2",
            "`one` uses `pytest.fixture`",
        ),
        (
            "class TestAdd:\n    def test_a(self, tmp_path): assert add(1, 1) == 2",
            "`test_a` has the parameter `tmp_path`",
        ),
        ({"inputs": ["1"], "outputs": []}, "1 inputs for 0 outputs"),
        ([{"input": "1"}], "expected `input` and `output`; got input"),
    ],
)
def test_tests_that_cannot_be_read_are_named_by_their_row(tests: Any, said: str) -> None:
    rewards = open_rewards([{"name": "unit_tests", "options": {"allow_code_execution": True}}])
    with pytest.raises(DataError, match=f"reward `unit_tests`, row 5: the tests in `tests` can't be read: .*{said}"):
        rewards.score([Sample("p", block(RIGHT), columns={"tests": tests})], rows=[5])
    with pytest.raises(DataError, match="row 5: "):
        rewards.score([Sample("p", block(RIGHT))], rows=[5])


def test_the_last_block_of_python_is_the_code() -> None:
    assert last_block("```python\na\n```\ntext\n```py\nb\n```\n```json\n{}\n```") == "b\n"
    assert last_block("```\na\n```") == "a\n" and last_block("  ```python\n  a\n  ```") == "a\n"
    assert last_block("```python\nnever closed") is None and last_block("no code") is None
    rewards = open_rewards([{"name": "unit_tests", "options": {"allow_code_execution": True, "no_code_score": -1}}])
    assert rewards.score([Sample("p", "no code", columns={"tests": ASSERTS})]).total.tolist() == [-1.0]
    whole = open_rewards([{"name": "unit_tests", "options": {"allow_code_execution": True, "code": "whole"}}])
    assert whole.score([Sample("p", RIGHT, columns={"tests": ASSERTS})]).total.tolist() == [1.0]


def test_read_tests_counts_what_asserts_or_calls() -> None:
    found = read_tests("import math\nx = 1\nassert f(x)\ncheck(f)\ndef helper():\n    assert True")
    assert [counts for _, counts in found.pieces] == [False, False, True, True, False]


# Hostile code: it gets 0, and the machine keeps what it had

HOSTILE = {
    "an infinite loop": "while True:\n    pass",
    "a loop that catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "a fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "a thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
    "a memory bomb": "hoard = []\nwhile True:\n    hoard.append(bytearray(10**7))",
    "much output": "while True:\n    print('x' * 10000)",
    "much output to stderr": "import sys\nwhile True:\n    sys.stderr.write('x' * 10000)",
    "an early exit": "import sys\nsys.exit(0)",
    "an exit without clean-up": "import os\nos._exit(0)",
    "a signal to itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "a line that looks like a verdict": "print('passed 0\\npassed 1\\npassed 2\\npassed 3\\n1.0')\nraise SystemExit(0)",
    "verdicts into every descriptor": (
        "import os\nfor fd in range(3, 64):\n    try:\n"
        "        os.write(fd, b''.join(b'%032d passed %d\\n' % (0, n) for n in range(9)))\n"
        "    except OSError:\n        pass\nos._exit(0)"
    ),
    "patched helpers": (
        "import builtins, os, sys\nbuiltins.AssertionError = type('Never', (Exception,), {})\nbuiltins.exec = print\n"
        "builtins.compile = print\nos.write = os._exit = sys.exit = lambda *a: None\ndef add(a, b): return 7"
    ),
    "a traced assert": "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = lambda *a: None\ndef add(a, b): return 7",
    "an exit in the tested function": "import os\ndef add(a, b):\n    os._exit(0)",
    "an exit from the tests": "def add(a, b):\n    raise SystemExit(0)",
    "a big file": "open('big', 'wb').write(b'x' * 10**9)",
}  # fmt: skip


QUICK = {
    "an early exit",
    "an exit without clean-up",
    "a line that looks like a verdict",
    "patched helpers",
    "much output",
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE]
)
def test_hostile_code_fails_and_ends(name: str) -> None:
    began = time.monotonic()
    assert score(HOSTILE[name], seconds=1, memory_mb=256, total_seconds=4) == 0.0
    assert time.monotonic() - began < 15


@pytest.fixture
def listener() -> Iterator[int]:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        yield server.getsockname()[1]


def reach(attempt: str) -> bool:
    """Return whether an attempt succeeds inside: it is the test of code that does nothing."""
    run = run_untrusted([("attempt.py", attempt)], CodeLimits(seconds=5))
    return run.passed == {0}


def test_what_untrusted_code_cannot_reach(listener: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("s3cret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    attempts = {
        "the network": f"import socket; socket.create_connection(('127.0.0.1', {listener}), timeout=1)",
        "a program": "import subprocess; subprocess.run(['true'], check=True)",
        "a shell": "import os; assert os.system('true') == 0",
        "a process": "import os; os.fork()",
        "this process": f"import os; os.kill({os.getpid()}, 0)",
        "a file of the user": f"open({str(secret)!r}).read()",
        "a list of files": f"import os; assert os.listdir({str(tmp_path)!r})",
        "this process's environment": f"assert b'hf_secret' in open('/proc/{os.getpid()}/environ', 'rb').read()",
        "the environment": "import os; assert any('TOKEN' in key for key in os.environ)",
        "a file elsewhere": f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
        "the permissions of a file": f"import os; os.chmod({str(secret)!r}, 0o777)",
        "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "this project's directory": "import os; assert 'rlhf' in os.getcwd() and os.path.exists('pyproject.toml')",
    }
    enforced = run_untrusted([("probe.py", "pass")], CodeLimits()).enforced
    if not all(enforced.values()):
        pytest.skip(f"this kernel doesn't enforce all of it: {enforced}")
    assert [name for name, attempt in attempts.items() if reach(attempt)] == []
    assert secret.read_text() == "s3cret" and not (tmp_path / "new").exists()
    assert reach("import random, math, json, numpy; open('own', 'w').write('x'); assert open('own').read() == 'x'")


def refused_by_hook(attempt: str, directory: Path) -> bool:
    """Tell whether Python's own functions refuse an attempt where the kernel refuses nothing."""
    hook = f"from rlhf_core.infra.untrusted_program import refuse_events\nrefuse_events({str(directory)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", hook + attempt], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 or "PermissionError" in done.stderr, done.stderr
    return done.returncode != 0


def test_without_the_kernels_limits_pythons_own_functions_are_refused(tmp_path: Path) -> None:
    directory, secret = tmp_path / "own", tmp_path / "secret.txt"
    directory.mkdir()
    secret.write_text("s3cret")
    (tmp_path / "empty").mkdir()
    (directory / "link").symlink_to(secret)
    attempts = [
        "import os; os.fork()",
        "import os; os.system('true')",
        "import socket; socket.socket()",
        f"open({str(secret)!r})",
        "open('../secret.txt')",
        "open('link')",
        f"import os; os.open({str(secret)!r}, os.O_RDONLY)",
        f"import pathlib; pathlib.Path({str(tmp_path / 'new')!r}).write_text('x')",
        "import os; open(os.path.join(os.__file__, '..', 'new'), 'w')",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, 'here')",
        f"import os; open('a', 'w'); os.rename('a', {str(secret)!r})",
        f"import os; os.link({str(secret)!r}, 'here')",
        f"import os; os.symlink('a', {str(tmp_path / 'new')!r})",
        f"import os; os.truncate({str(secret)!r}, 0)",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.rmdir({str(tmp_path / 'empty')!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; list(os.scandir({str(tmp_path)!r}))",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        "import os, shutil; shutil.rmtree(os.path.join(os.path.dirname(os.__file__), 'email'))",
        "import os; os.remove('../secret.txt', dir_fd=os.open('.', os.O_RDONLY))",
    ]
    assert [attempt for attempt in attempts if not refused_by_hook(attempt, directory)] == []
    assert secret.read_text() == "s3cret" and {one.name for one in tmp_path.iterdir()} == {"own", "secret.txt", "empty"}
    assert subprocess.run([sys.executable, "-c", "import email.message"], check=False).returncode == 0
    allowed = (
        "import tempfile, shutil, os, json, random, zoneinfo, numpy\nopen('a', 'w').write('x'); assert open('a').read() == 'x'\n"
        "os.mkdir('d'); open('d/b', 'w'); os.rename('d/b', 'c'); os.remove('c'); os.remove('link'); assert os.listdir() \n"
        "shutil.rmtree('d'); open(os.devnull, 'w').write('x'); open(json.__file__).read(); print(open(0).read())"
    )
    assert not refused_by_hook(allowed, directory)


def test_the_hook_is_there_wherever_a_protection_is_missing(tmp_path: Path) -> None:
    """Files alone may be unprotected, as before Linux 5.13: then Python's own functions must be refused, as the warning says."""
    secret = tmp_path / "secret.txt"
    secret.write_text("s3cret")
    (tmp_path / "own").mkdir()
    script = f"""
import os
from rlhf_core.infra import untrusted_program
untrusted_program.restrict_files = lambda *_: False
job = {{"seconds": 9, "memory_bytes": 2**30, "file_bytes": 2**20, "parent": os.getppid()}}
print(untrusted_program.protect(job, {str(tmp_path / "own")!r})["files"])
try:
    open({str(secret)!r})
except PermissionError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["False", "refused"], done.stderr


ABANDONING = """
import sys, threading, time
from rlhf_core.infra.untrusted_code import CodeLimits, run_untrusted
code = "import ctypes, os, time\\ntry:\\n    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\\n    os.setuid(65534)\\nexcept Exception:\\n    pass\\n"
code += "open('pid', 'w').write(str(os.getpid()))\\ntime.sleep(300)"
threading.Thread(target=run_untrusted, args=([("p.py", code)], CodeLimits(seconds=300)), daemon=True).start()
time.sleep(float(sys.argv[1]))
"""  # noqa: E501


def left_over(directory: Path) -> psutil.Process:
    """Return the process of untrusted code whose directory is in `directory`, once it runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for file in directory.glob("rlhf-code-*/pid"):
            if text := file.read_text():
                return psutil.Process(int(text))
        time.sleep(0.05)
    raise AssertionError("the code didn't start")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's end")
def test_code_ends_with_the_run_that_started_it(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", ABANDONING, "300"], env=environment)
    code = left_over(tmp_path)
    try:
        run.kill()
        run.wait()
        deadline = time.monotonic() + 10
        while code.is_running() and code.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not code.is_running() or code.status() == psutil.STATUS_ZOMBIE
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            code.kill()


def test_code_whose_run_has_ended_already_does_not_start() -> None:
    script = "import ctypes, os, sys; from rlhf_core.infra.untrusted_program import end_with_parent as end\n"
    script += "end(ctypes.CDLL(None) if sys.platform.startswith('linux') else None, {}, 300); print('runs')"
    for parent, said in ("os.getppid()", b"runs\n"), ("os.getppid() + 1", b""):
        done = subprocess.run([sys.executable, "-c", script.format(parent)], capture_output=True, check=False)
        assert done.stdout == said and done.returncode == (not said)


def test_where_the_kernel_does_not_end_code_with_its_run_a_timer_does() -> None:
    script = "import os, signal; from rlhf_core.infra.untrusted_program import end_with_parent\n"
    script += "end_with_parent(None, os.getppid(), 20.0); print(signal.getitimer(signal.ITIMER_REAL)[0])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 20 < float(done.stdout) <= 25


def test_its_directory_is_removed() -> None:
    found: list[str] = []
    run = run_untrusted([("p.py", "import os; print(os.getcwd()); open('a', 'w').write('x')")], CodeLimits(), stdin=b"")
    found.append(run.output.decode().strip())
    assert run.returncode == 0 and found[0] and not Path(found[0]).exists()


def test_a_test_that_ends_the_process_leaves_the_others_their_verdicts() -> None:
    code = "import os, time\ndef add(a, b):\n    if a == 0:\n        os._exit(0)\n    while a == -1: pass\n    return a + b"
    assert score(code, seconds=1) == 0.5


def test_many_completions_at_once_keep_their_order() -> None:
    rewards = open_rewards(
        [{"name": "unit_tests", "options": {"allow_code_execution": True, "seconds": 20}, "concurrency": 4}]
    )
    threads = threading.active_count()
    samples = [Sample("p", block(RIGHT if n % 3 else "x"), columns={"tests": ASSERTS[:1]}) for n in range(9)]
    assert rewards.score(samples).by_name["unit_tests"] == [float(n % 3 > 0) for n in range(9)]
    assert threading.active_count() - threads <= 6


def test_options_have_bounds() -> None:
    for options in ({"seconds": 0}, {"memory_mb": 1}, {"score": "some"}):
        with pytest.raises(ConfigError):
            UnitTestsConfig.parse({"allow_code_execution": True, **options})


@pytest.mark.slow
class TestUnitTests(RewardContract):
    method = "unit_tests"
    options: ClassVar[dict[str, Any]] = {"allow_code_execution": True, "column": "checks"}
    changes: ClassVar[dict[str, Any]] = {"no_code_score": -1.0, "score": "all"}

    def samples(self) -> list[Sample]:
        codes = (RIGHT, "def add(a, b): return a - b", "def add(a, b): return a", "not code")
        texts = [block(code) for code in codes[:3]] + [codes[3]]
        return [Sample(f"p{n}", text, columns={"checks": ASSERTS}) for n, text in enumerate(texts)]


# Tests as `unittest.TestCase` classes

CASES = """
import unittest
from unittest.mock import patch

class Base(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.pair = (1, 2)

    def setUp(self):
        self.zero = 0

    def test_sum(self):
        self.assertEqual(add(*self.pair), 3)

class TestCases(Base):
    def test_zero(self):
        self.assertEqual(add(self.zero, self.zero), 0)

    @patch("builtins.print")
    def test_large(self, shown):
        for large in (10, 100):
            with self.subTest(large=large):
                self.assertEqual(add(large, large), 2 * large)

    @unittest.skip("not yet")
    def test_later(self):
        self.fail()

    async def helper(self):
        pass

if __name__ == "__main__":
    unittest.main()
"""


@pytest.mark.parametrize("tests", [CASES, [CASES], CASES + "\nunittest.main()\n"], ids=["source", "list", "main"])
def test_each_method_of_a_test_case_is_a_test(tests: Any) -> None:
    """One of `Base`, three of `TestCases`, one of which it inherits."""
    assert sum(counts for _, counts in read_tests(tests).pieces) == 4
    assert score(RIGHT, tests) == 1.0
    assert score("def add(a, b):\n    return 0", tests) == 0.25
    assert score("def add(a, b):\n    return a + b if a < 10 else 0", tests) == 0.75
    assert score("import unittest\ndef add(a, b):\n    raise unittest.SkipTest", tests) == 0.0
    assert score("import os\ndef add(a, b):\n    os._exit(0) if a == 10 else None\n    return a + b", tests) == 0.75


CASE = """
import unittest
class T(unittest.TestCase):
    def test_a(self):
        self.assertEqual(add(1, 2), 3)
"""


@pytest.mark.parametrize(
    "end",
    [
        "unittest.TextTestRunner().run(unittest.TestLoader().loadTestsFromTestCase(T))",
        "suite = unittest.TestSuite()\nsuite.addTest(T('test_a'))\nunittest.TextTestRunner().run(suite)",
        "def run():\n    unittest.TextTestRunner().run(unittest.TestSuite([T('test_a')]))\nrun()",
        "class Empty(unittest.TestCase):\n    def test_later(self):\n        pass",
        "if __name__ == '__main__':\n    unittest.main(argv=[''], exit=False)",
        "print('done')\nassert (add(1, 2), 'always true')",
    ],
)
def test_only_what_can_fail_is_a_test(end: str) -> None:
    assert sum(counts for _, counts in read_tests(CASE + end).pieces) == 1
    assert score("def add(a, b):\n    return a * b", CASE + end) == 0.0


def counted(tests: Any) -> list[str]:
    return [source for source, counts in read_tests(tests).pieces if counts]


def test_what_can_fail_without_an_assert_is_a_test() -> None:
    raising = "if add(1, 2) != 3:\n    raise ValueError"
    guarded = f"import numpy as np\nif __name__ == '__main__':\n    {raising.replace(chr(10), chr(10) + '    ')}"
    through = "class Checks:\n    def run(self):\n        assert add(1, 2) == 3\nChecks().run()\nprint(Checks)"
    library = "import numpy as np\nnp.testing.assert_allclose(add(1, 2), 3)\nnp.random.seed(0)"
    assert counted(raising) == counted(guarded) == [raising]
    assert counted(through) == ["Checks().run()"]
    assert counted(library) == ["np.testing.assert_allclose(add(1, 2), 3)"]
    assert counted(["import math", "assert add(1, 2) == 3"]) == ["assert add(1, 2) == 3"]
    assert score("def add(a, b):\n    return a * b", guarded) == 0.0


MIXED = """
import unittest as ut
from unittest import TestCase as Case
class Mixin:
    def test_small(self):
        self.assertEqual(self.f(1, 2), 3)
    def test_large(self):
        self.assertEqual(self.f(10, 20), 30)
class Far(Mixin):
    def test_zero(self):
        self.assertEqual(self.f(0, 0), 0)
class TestOne(Far, Case):
    f = staticmethod(lambda a, b: add(a, b))
    test_large = None
class TestTwo(TestOne, ut.TestCase):
    test_small = None
"""


def test_methods_of_mixins_run() -> None:
    """Two of `TestOne`, one of `TestTwo`; the mixins alone are no cases."""
    assert len(counted(MIXED)) == 3
    assert score(RIGHT, MIXED) == 1.0
    assert score("def add(a, b):\n    return a * b", MIXED) == pytest.approx(2 / 3)


CHECKED = """
import math
import unittest
from unittest import IsolatedAsyncioTestCase
class T(unittest.TestCase):
    def test_equal(self):
        found = add(1, 2)
        self.assertEqual(found, 3)
    def test_raises(self):
        with self.assertRaises(TypeError):
            add(1, "a")
class A(IsolatedAsyncioTestCase):
    async def test_async(self):
        self.assertTrue(add(1, 2) == 3)
assert all(add(n, 1) == n + 1 for n in range(2))
assert math.isclose(add(0.5, 1), 1.5)
"""

WEAKENING = {
    "an assertion": "unittest.TestCase.assertEqual = unittest.TestCase.assertTrue = lambda *a, **k: None",
    "the code of an assertion": (
        "unittest.TestCase.assertEqual.__code__ = unittest.TestCase.assertTrue.__code__ = (lambda *a, **k: None).__code__"
    ),
    "a subclass": "unittest.IsolatedAsyncioTestCase.assertTrue = lambda *a: None",
    "attribute access": "unittest.TestCase.__getattribute__ = lambda s, n: (lambda *a, **k: None)",
    "expected failures": "unittest.TestCase.__unittest_expecting_failure__ = True",
    "the result": "unittest.TestResult.wasSuccessful = lambda s: True",
    "what raises": "unittest.case._AssertRaisesContext.__exit__ = lambda *a: True",
    "the class": "unittest.TestCase = unittest.case.TestCase = type('TestCase', (unittest.TestCase,), {'assertEqual': print})",
    "the module": "sys.modules['unittest'] = sys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)",
    "a builtin": "builtins.all = builtins.isinstance = builtins.hasattr = lambda *a: True",
    "a builtin's name elsewhere": "unittest.case.issubclass = unittest.case.len = lambda *a: True",
    "a function of a library": "math.isclose = lambda *a, **k: True",
    "the import": "builtins.__import__ = lambda *a, **k: __builtins__\n__builtins__ = {'all': lambda a: True}",
    "a trace": "sys.settrace(lambda *a: None)\nthreading.settrace(lambda *a: None)",
}


@pytest.mark.parametrize("name", WEAKENING)
def test_code_does_not_weaken_assertions(name: str) -> None:
    code = "import builtins, math, sys, threading, types, unittest, unittest.async_case\n"
    assert score(code + "def add(a, b):\n    return 0\n" + WEAKENING[name], CHECKED) == 0.0


def test_right_code_may_change_modules() -> None:
    code = (
        "import builtins, json, math, random, sys\njson.JSONEncoder.made = math.made = 1\nsys.setrecursionlimit(5000)\n"
    )
    used = "assert __import__('json').JSONEncoder.made == __import__('math').made == 1\nassert input() == 'x'"
    assert score(code + RIGHT, CHECKED) == 1.0
    assert score(code + RIGHT, "import builtins, json\nbuiltins.input = lambda: 'x'\n" + used) == 1.0


def test_a_test_during_which_unittest_changes_fails() -> None:
    code = "import unittest\ndef add(a, b):\n    unittest.TestCase.assertEqual = lambda *a: None\n    return {}\n"
    assert score(code.format(0), CASE) == 0.0
    stored = CASE.replace("self.assertEqual(add(1, 2), 3)", "found = add(1, 2)\n        self.assertEqual(found, 3)")
    assert score(code.format(0), stored) == 0.0


SKIPS = """
import sys, unittest
class T(unittest.TestCase):
    @unittest.skipIf(sys.version_info > (3, 0), "old")
    def test_decorated(self):
        self.assertEqual(add(1, 2), 0)
    def test_asked(self):
        self.skipTest("no data")
    def test_raised(self):
        raise unittest.SkipTest("no data")
    def test_runs(self):
        self.assertEqual(add(1, 2), 3)
@unittest.skipUnless(False, "never")
class Never(unittest.TestCase):
    def test_class(self):
        self.assertEqual(add(1, 2), 0)
class NotSetUp(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise unittest.SkipTest("no data")
    def test_class(self):
        self.assertEqual(add(1, 2), 0)
"""


def test_what_the_tests_skip_counts_as_neither() -> None:
    assert len(counted(SKIPS)) == 6
    assert score(RIGHT, SKIPS) == score(RIGHT, SKIPS, score="all") == 1.0
    assert score("def add(a, b):\n    return a * b", SKIPS) == 0.0


def test_code_does_not_skip_its_tests() -> None:
    """`add` is right in one of the two."""
    tests = CASE + "    def test_b(self):\n        self.assertEqual(add(2, 2), 4)\n"
    skips = "import unittest\ndef add(a, b):\n    if a == 1:\n        {}\n    return a * b"
    for how in ("raise unittest.SkipTest", "unittest.TestCase().skipTest('x')", "exec('raise unittest.SkipTest')"):
        assert score(skips.format(how), tests) == 0.5


def test_rows_of_which_every_test_skips_get_nothing_and_are_said(caplog: Any) -> None:
    tests = "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.skipTest('x')\n"
    assert score(RIGHT, tests) == 0.0
    assert "every test of a row skipped itself" in caplog.text


PYTEST = """
import pytest
class TestAdd:
    @classmethod
    def setup_class(cls):
        cls.one = 1
    def setup_method(self, method):
        self.two = 2
    def test_small(self):
        assert add(self.one, self.two) == 3
    def test_zero(self):
        assert add(0, 0) == 0
    @pytest.mark.skipif("add(0, 1) == 1", reason="x")
    def test_never(self):
        assert add(1, 1) == 0
class TestMore(TestAdd):
    async def test_raises(self):
        with pytest.raises(TypeError):
            add(1, "a")
def test_function():
    assert add(2, 3) == 5
"""


def test_classes_of_pytest_run() -> None:
    assert len(counted(PYTEST)) == 8
    assert score(RIGHT, PYTEST) == 1.0
    assert score("def add(a, b):\n    return a + b if b < 2 else 0", PYTEST) == pytest.approx(3 / 6)


def test_patched_functions_get_their_arguments() -> None:
    tests = "from unittest.mock import patch\n@patch('builtins.print')\ndef test_a(shown):\n    assert add(1, 2) == 3\n"
    tests += "    shown.assert_not_called()\n"
    assert score(RIGHT, tests) == 1.0
    assert score("def add(a, b):\n    print(a)\n    return a + b", tests) == 0.0


# Files of its own

COPIES = """
import os, pathlib, shutil, stat, tarfile, tempfile, zipfile
def work():
    pathlib.Path("a.txt").write_text("text")
    pathlib.Path("touched").touch()
    pathlib.Path("a.txt").touch()
    os.mkdir("b")
    shutil.copy("a.txt", "b")
    shutil.copy2("a.txt", "b/c.txt")
    shutil.copytree("b", "d")
    shutil.move("d", "e")
    os.chmod("a.txt", 0o600)
    with tarfile.open("t.tar", "w") as tar:
        tar.add("b")
    with tarfile.open("t.tar") as tar:
        tar.extractall("from_tar", filter="data")
    shutil.make_archive("zipped", "zip", "b")
    shutil.unpack_archive("zipped.zip", "from_zip")
    return sorted(str(path) for path in pathlib.Path(".").rglob("*.txt"))
"""


@pytest.mark.parametrize("enforced", [True, False], ids=["kernel", "events"])
def test_code_copies_files_of_its_own(enforced: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not enforced:
        program = Path(untrusted_code.__file__).with_name("untrusted_program.py").read_text()
        assert program.count("if not all(enforced.values()):") == 1
        changed = tmp_path / "untrusted_program.py"
        changed.write_text(program.replace("if not all(enforced.values()):", "if True:"))
        monkeypatch.setattr(untrusted_code, "_PROGRAM", changed)
    there = ["a.txt", "b/a.txt", "b/c.txt", "e/a.txt", "e/c.txt"]
    there += ["from_tar/b/a.txt", "from_tar/b/c.txt", "from_zip/a.txt", "from_zip/c.txt"]
    assert score(COPIES, [f"assert work() == {there!r}", "assert open('touched').read() == ''"]) == 1.0


def test_permissions_and_times_elsewhere_stay_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    before = secret.stat()
    tries = [
        f"os.chmod({str(secret)!r}, 0o777)",
        f"os.utime({str(secret)!r}, (1, 1))",
        f"os.symlink({str(secret)!r}, 'link'); os.chmod('link', 0o777)",
        f"os.chmod.__wrapped__({str(secret)!r}, 0o777)",
        "os.chmod('missing', 0o777)",
        "open('own', 'w').close(); os.chmod.__wrapped__('own', 0o777)",
    ]
    code = f"import os\ndef tried(n):\n    try:\n        exec({tries!r}[n])\n    except OSError:\n        return True\n"
    assert score(code, [f"assert tried({number})" for number in range(len(tries))]) == 1.0
    assert (secret.stat().st_mode, secret.stat().st_mtime) == (before.st_mode, before.st_mtime)
