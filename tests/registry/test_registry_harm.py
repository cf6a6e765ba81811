"""A plugin or an installation that is broken in any way is shown with its reason, and harms nobody else."""

from __future__ import annotations

import compileall
import gc
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from rlhf_core import registry
from rlhf_core.cli import main
from rlhf_core.cli.doctor import find_problems
from rlhf_core.contracts.reward import RewardFn
from rlhf_core.infra.errors import ConfigError, PluginError, printable
from rlhf_core.registry.distributions import unreadable_distributions
from rlhf_core.registry.guarded import GuardedError, run_guarded
from rlhf_core.registry.hooks import load_hooks

REWARD = '''
"""A reward."""
from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.reward import RewardFn


class Mine(RewardFn):
    """Likes what mine likes."""

    api = 1
    Config = BaseConfig

    def score(self, samples):
        return [0.0 for _ in samples]
'''


def one(name: str, distribution: str | None = None, kind: str = "reward") -> registry.Plugin:
    found = [p for p in registry.find(kind) if p.name == name and distribution in (None, p.distribution)]
    assert len(found) == 1, found
    return found[0]


def good_ones_are_well() -> None:
    """What ships with the core is there and loads, and so does a good third party's."""
    assert one("good").status == "ok" and registry.get("reward", "good").__name__ == "Mine"
    shipped = [plugin for plugin in registry.find() if plugin.distribution == "rlhf-core"]
    assert len(shipped) > 20 and {plugin.status for plugin in shipped} == {"ok"}


@pytest.fixture
def good(install):
    install("good", {"good.py": REWARD}, rewards={"good": "good:Mine"})


# What a source may be

NESTED = {
    "minus": "-" * 100_000 + "1",
    "not": "not " * 50_000 + "1",
    "brackets": "(" * 5_000 + ")" * 5_000,
    "attributes": "x" + ".y" * 100_000,
    "calls": "x" + "()" * 100_000,
    "sums": "+".join(["1"] * 100_000),
    "comparisons": "1 if x else " * 20_000 + "1",
    "lambdas": "lambda: " * 50_000 + "1",
    "elif": "if x: pass\n" + "elif x: pass\n" * 20_000,
    "f-string": "f'" + "{x:" * 1_000 + "}" * 1_000 + "'",
    "indented": "".join(" " * depth + "if x:\n" for depth in range(500)) + " " * 500 + "pass",
}


@pytest.mark.parametrize("case", NESTED)
def test_source_that_nests_too_deeply_is_broken_or_read_and_hurts_nobody(install, good, case: str) -> None:
    install("deep", {"deep.py": f"{REWARD}\n{NESTED[case]}\n"}, rewards={"deep": "deep:Mine"})
    plugin = one("deep")
    assert plugin.status == "ok" or (plugin.status == "broken" and "deep.py" in plugin.reason), plugin
    if case in ("minus", "attributes", "calls"):
        assert plugin.status == "broken"
    good_ones_are_well()
    assert main(["show", "deep"]) == 0 and main(["list"]) == 0


def test_options_that_nest_too_deeply_hurt_only_their_own_table(install, good) -> None:
    deep = "class Settings(BaseConfig):\n    size: int = " + "+".join(["1"] * 900)
    source = REWARD.replace("\nclass Mine", f"\n{deep}\n\n\nclass Mine").replace(
        "Config = BaseConfig", "Config = Settings"
    )
    install("deep", {"deep.py": source}, rewards={"deep": "deep:Mine"})
    assert main(["show", "deep"]) == 0


ODD = {
    "null bytes": (b"\0" + REWARD.encode(), "broken", "null bytes"),
    "unknown encoding": (b"# coding: klingon\n" + REWARD.encode(), "broken", "klingon"),
    "wrong encoding": (REWARD.encode() + b"X = '\xff\xfe'\n", "broken", "odd.py"),
    "utf-16": (REWARD.encode("utf-16"), "broken", "odd.py"),
    "latin-1": (b"# coding: latin-1\n" + REWARD.encode() + b"# \xe9\n", "ok", ""),
    "byte-order mark": (b"\xef\xbb\xbf" + REWARD.encode(), "ok", ""),
    "carriage returns": (REWARD.replace("\n", "\r\n").encode(), "ok", ""),
    "odd escapes": (REWARD.encode() + b'X = "\\d"\n', "ok", ""),
    "empty": (b"", "broken", "isn't defined"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_bytes_are_told(install, good, recwarn, case: str) -> None:
    data, status, reason = ODD[case]
    root = install("odd", {}, rewards={"odd": "odd:Mine"})
    (root / "odd.py").write_bytes(data)
    plugin = one("odd")
    assert plugin.status == status and reason in plugin.reason, plugin
    good_ones_are_well()
    assert not [w for w in recwarn if issubclass(w.category, SyntaxWarning)]


def test_a_file_that_is_too_large_for_a_source_is_not_read(install, good) -> None:
    root = install("huge", {"huge.py": REWARD}, rewards={"huge": "huge:Mine"})
    with (root / "huge.py").open("r+b") as file:
        file.truncate(10**12)  # a sparse file: nothing is written
    begin = time.monotonic()
    assert "1,000,000,000,000 bytes" in one("huge").reason
    assert time.monotonic() - begin < 5
    good_ones_are_well()


def test_what_is_no_readable_file_is_told(install, good, monkeypatch) -> None:
    names = ("directory", "loop", "pipe", "dangling")
    root = install("odd", {}, rewards={name: f"odd_{name}:Mine" for name in names})
    (root / "odd_directory.py").mkdir()
    (root / "odd_loop.py").symlink_to(root / "odd_loop.py")
    (root / "odd_dangling.py").symlink_to(root / "gone.py")
    os.mkfifo(root / "odd_pipe.py")
    for name in names:
        assert one(name).status == "broken" and f"odd_{name}" in one(name).reason
    good_ones_are_well()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(install, good) -> None:
    root = install("odd", {"odd.py": REWARD}, rewards={"odd": "odd:Mine"})
    (root / "odd.py").chmod(0)
    assert one("odd").status == "broken" and "Permission" in one("odd").reason


TARGETS = {
    "function": ("def f(): pass", "odd:f", "`f` in `odd` is a function, not a class"),
    "async": ("async def f(): pass", "odd:f", "is a function"),
    "instance": (REWARD + "\nmine = Mine()", "odd:mine", "`mine` in `odd` is a value, not a class"),
    "alias": (REWARD + "\nOther = Mine", "odd:Other", "is a value"),
    "imported": ("from os.path import join as Mine", "odd:Mine", "imported there from `os.path`"),
    "module": (REWARD, "odd", "isn't of the form"),
    "below a module": (REWARD, "odd.deeper:Mine", "`odd` is a module, not a package"),
    "Python's own": ("", "sys:exit", "module `sys` is Python's own"),
    "brackets": (REWARD, "odd:Mine[", "isn't of the form"),
    "two colons": (REWARD, "odd:Mine:score", "isn't of the form"),
    "nothing": (REWARD, "", "isn't of the form"),
    "dots": (REWARD, "..odd:Mine", "isn't of the form"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_target_that_is_no_class_is_told(install, good, case: str) -> None:
    source, target, reason = TARGETS[case]
    install("odd", {"odd.py": source}, rewards={"odd": target})
    assert one("odd").status == "broken" and reason in one("odd").reason
    good_ones_are_well()


@pytest.mark.parametrize("target", ["odd:Mine [gpu, fast]", "odd : Mine", "odd:Mine[gpu]"])
def test_extras_and_blanks_in_a_target_are_no_fault(install, target: str) -> None:
    install("odd", {"odd.py": REWARD}, rewards={"odd": target})
    assert (one("odd").status, one("odd").target) == ("ok", "odd:Mine")
    assert registry.get("reward", "odd").__name__ == "Mine"


def test_a_class_within_blocks_and_classes_is_found(install) -> None:
    body = REWARD[REWARD.index("class Mine") :].replace("\n", "\n        ")
    source = REWARD[: REWARD.index("class Mine")] + f"if True:\n    class Outer:\n        {body}"
    source = f"from contextlib import suppress\nwith suppress(KeyError):\n    pass\n{source}"
    install("odd", {"odd.py": source}, rewards={"odd": "odd:Outer.Mine"})
    assert one("odd").status == "ok" and registry.get("reward", "odd").__qualname__ == "Outer.Mine"


# Where a source may be


def test_a_plugin_in_a_zip_is_read_and_loads(tmp_path, monkeypatch, good) -> None:
    archive = tmp_path / "acme.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped_one.py", REWARD)
        file.writestr("zipped/__init__.py", "")
        file.writestr("zipped/sub/", "")  # a namespace package in a zip
        file.writestr("zipped/sub/two.py", REWARD)
        file.writestr("zipped-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: zipped\nVersion: 1.0\n")
        table = "[rlhf_core.rewards]\none = zipped_one:Mine\ntwo = zipped.sub.two:Mine\ngone = zipped.gone:Mine\n"
        file.writestr("zipped-1.0.dist-info/entry_points.txt", table)
    monkeypatch.syspath_prepend(str(archive))
    for name in ("one", "two"):
        assert (one(name).status, one(name).summary) == ("ok", "Likes what mine likes.")
        assert registry.get("reward", name).__name__ == "Mine"
    assert "no module `zipped.gone`" in one("gone").reason
    good_ones_are_well()


def compiled_only(root: Path) -> None:
    compileall.compile_dir(str(root), legacy=True, quiet=2)
    for source in root.rglob("*.py"):
        source.unlink()


@pytest.mark.parametrize("module", ["bare", "bare_package.mine"])
def test_a_plugin_without_source_is_listed_and_loads(install, capsys, module: str) -> None:
    files = {f"{module.replace('.', '/')}.py": REWARD}
    if "." in module:
        files["bare_package/__init__.py"] = ""
    root = install("acme", files, rewards={"bare": f"{module}:Mine"})
    compiled_only(root)
    plugin = one("bare")
    assert (plugin.status, plugin.api, plugin.summary) == ("ok", None, "")
    assert "no source to read" in plugin.reason and "once it is loaded" in plugin.reason
    assert main(["show", "bare"]) == 0
    assert "no source to read" in capsys.readouterr().out
    assert main(["show", "bare", "--all", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["status"], shown["api"], shown["summary"]) == ("ok", 1, "Likes what mine likes.")
    assert shown["doc"] == "Likes what mine likes." and shown["reason"] == ""
    assert one("bare").summary == "Likes what mine likes."  # known from now on
    assert "bare" in registry.rewards


def test_a_plugin_without_source_that_is_no_plugin_is_told_when_it_loads(install) -> None:
    root = install("acme", {"bare.py": REWARD.replace("api = 1", "api = 7")}, rewards={"bare": "bare:Mine"})
    compiled_only(root)
    with pytest.raises(PluginError, match="written for api 7"):
        registry.get("reward", "bare")
    assert one("bare").status == "wrong-api"


NAMESPACES = {
    "implicit": {},
    "pkgutil": {"shared/__init__.py": "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"},
    "nested": {},
}


@pytest.mark.parametrize("make", NAMESPACES)
def test_namespace_packages_are_found_in_all_their_places(install, make: str) -> None:
    below = "shared/inner" if make == "nested" else "shared"
    for name in ("first", "second"):
        files = {**NAMESPACES[make], f"{below}/{name}.py": REWARD}
        install(name, files, rewards={name: f"{below.replace('/', '.')}.{name}:Mine"})
    install("third", {**NAMESPACES[make]}, rewards={"third": f"{below.replace('/', '.')}.gone:Mine"})
    assert {one(name).status for name in ("first", "second")} == {"ok"}
    assert "no module" in one("third").reason
    assert "shared" not in sys.modules
    for name in ("second", "first"):
        assert registry.get("reward", name).__module__.endswith(name)


def test_a_package_whose_init_defines_the_class_is_found(install) -> None:
    install("acme", {"acme/__init__.py": REWARD}, rewards={"mine": "acme:Mine"})
    install("bare", {"bare_ns/inner/x.py": ""}, rewards={"bare": "bare_ns:Mine"})
    assert one("mine").status == "ok"
    assert "without an `__init__.py`" in one("bare").reason


class Editable:
    """What setuptools puts on `sys.meta_path` for an editable installation: names and where they are."""

    def __init__(self, **places: Path) -> None:
        self.places = places

    def find_spec(self, name, path=None, target=None):
        place = self.places.get(name.replace(".", "_"))
        if place is None:
            return None
        packages = [str(place)] if place.is_dir() else None
        file = place / "__init__.py" if packages else place
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=packages)


def test_what_an_editable_installation_maps_is_found(install, tmp_path, monkeypatch) -> None:
    source = tmp_path / "sources"
    (source / "inner").mkdir(parents=True)
    for path in (source / "__init__.py", source / "one.py", source / "inner" / "two.py"):
        path.write_text(REWARD)
    (source / "inner" / "__init__.py").write_text("")
    finder = Editable(mapped=source, mapped_elsewhere=source / "inner" / "two.py")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    targets = {"top": "mapped", "one": "mapped.one", "two": "mapped.inner.two", "moved": "mapped.elsewhere"}
    install("acme", {}, rewards={name: f"{module}:Mine" for name, module in targets.items()})
    for name in targets:
        assert one(name).status == "ok", one(name)
        assert registry.get("reward", name).__name__ == "Mine"
    for name in [name for name in sys.modules if name.startswith("mapped")]:
        del sys.modules[name]


class Finder:
    def find_spec(self, name, path=None, target=None):
        raise RuntimeError("a hook that fails")


def test_an_import_hook_of_someone_else_that_raises_blames_nobody(install, monkeypatch, good) -> None:
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    install("late", {"late.py": REWARD}, rewards={"late": "late:Mine"})
    assert (one("late").status, one("good").status) == ("ok", "ok")


# Names

NAMES = {
    "two:parts": "can't be addressed",
    "a/b": "can't be addressed",
    "-flag": "can't be addressed",
    "two words": "can't be addressed",
    "a,b": "can't be addressed",
    "esc\x1b[31m": "can't be addressed",
    "\u202eltr": "can't be addressed",
    "\N{ZERO WIDTH SPACE}": "can't be addressed",
    "[group": "can't be addressed",
    "run.yaml": "reads as a file's",
    "": "has no name",
    "x" * 101: "can't be addressed",
}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_cannot_be_addressed_is_broken(install, good, capsys, name: str) -> None:
    install("acme", {"acme.py": REWARD}, rewards={name: "acme:Mine"})
    plugin = next(p for p in registry.find("reward") if p.distribution == "acme")
    assert plugin.status == "broken" and NAMES[name] in plugin.reason
    assert name not in list(registry.rewards) or not name
    if not name.isspace() and name:
        with pytest.raises(ConfigError):
            registry.register("reward", name, registry.get("reward", "good"))
    good_ones_are_well()
    assert main(["list"]) == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e]", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["größe", "best.of_n-2", "7b", "_x", "评分"])
def test_names_of_any_script_can_be_addressed(install, name: str) -> None:
    install("acme", {"acme.py": REWARD}, rewards={name: "acme:Mine"})
    for form in (name, f"acme:{name}", f"reward:acme:{name}"):
        assert registry.lookup(form).name == name
    assert main(["show", name]) == 0


@pytest.mark.parametrize("distribution", ["local", "trainer", "Rewards", "-acme", "a:b", "a b"])
def test_a_distribution_whose_name_cannot_be_addressed_is_broken(install, good, distribution: str) -> None:
    install(distribution.replace(":", "_"), {"acme.py": REWARD}, rewards={"mine": "acme:Mine", "good": "acme:Mine"})
    metadata = next(Path(sys.path[0]).glob("*.dist-info")) / "METADATA"
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    plugin = one("mine")
    if distribution == "a:b":  # the directory's name can
        assert (plugin.status, plugin.qualified) == ("ok", "a-b:mine")
        return
    assert plugin.status == "broken" and "distribution" in plugin.reason
    good_ones = [p for p in registry.find("reward") if p.distribution == "good"]
    assert [p.status for p in good_ones] == ["ok"]


def test_a_distribution_named_local_is_not_what_register_added(install, monkeypatch) -> None:
    install("local", {"acme.py": REWARD}, rewards={"mine": "acme:Mine"})
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "rlhf-core")
    assert one("mine").status in ("broken", "disabled")
    with pytest.raises(PluginError):
        registry.load(one("mine"))


# What an import may do

NOISE = """
import ctypes, os, subprocess, sys
print("PRINTED")
sys.stdout.write("WRITTEN\\n")
sys.stdout.buffer.write(b"BYTES\\n")
os.write(1, b"DESCRIPTOR\\n")
subprocess.run(["echo", "CHILD"])
ctypes.CDLL(None).puts(b"C CODE")
sys.__stdout__.write("ORIGINAL\\n")
import atexit, logging
atexit.register(print, "GOODBYE")
logging.basicConfig(stream=sys.stdout, force=True)
logging.error("LOGGED")
"""
NOISES = ("PRINTED", "WRITTEN", "BYTES", "DESCRIPTOR", "CHILD", "C CODE", "ORIGINAL", "LOGGED")


@pytest.mark.parametrize(
    "arguments",
    [["list", "rewards", "--check", "--json"], ["show", "noisy", "--all", "--json"], ["schema", "noisy"]],
    ids=lambda arguments: arguments[0],
)
def test_what_an_import_prints_goes_to_stderr(install, arguments: list[str]) -> None:
    # Options that print when they are made, too.
    options = "    print('CLASS BODY')\n    size: list = Field(default_factory=lambda: print('FACTORY') or [])\n"
    source = REWARD.replace(
        "\nclass Mine", f"\nfrom pydantic import Field\nclass Own(BaseConfig):\n{options}\n\nclass Mine"
    )
    root = install(
        "noisy",
        {"noisy.py": NOISE + source.replace("Config = Base", "Config = Own #")},
        rewards={"noisy": "noisy:Mine"},
    )
    environment = {**os.environ, "PYTHONPATH": str(root), registry.ALLOW_VARIABLE: "noisy"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_core", *arguments], capture_output=True, text=True, env=environment, check=True
    )
    json.loads(done.stdout)
    expected = [*NOISES, "CLASS BODY"] + (["GOODBYE"] if arguments[0] != "list" else [])
    assert [noise for noise in expected if noise not in done.stderr] == []


def test_stdout_is_back_after_an_import_that_replaced_or_closed_it(install, capfd) -> None:
    source = (
        "import io, sys\n"
        "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\n"
        "sys.stdout = io.StringIO()\nsys.stderr = io.StringIO()\n"
    )
    install("noisy", {"noisy.py": source + REWARD}, rewards={"noisy": "noisy:Mine"})
    install(
        "closer",
        {"closer.py": "import sys\nsys.stdout.close()\nsys.stdout.detach()\n" + REWARD},
        rewards={"closer": "closer:Mine"},
    )
    before = sys.stdout, sys.stderr
    for name in ("noisy", "closer"):
        assert registry.get("reward", name).__name__ == "Mine"
        assert (sys.stdout, sys.stderr) == before
    print("still here", flush=True)
    os.write(1, b"and here\n")
    out, _ = capfd.readouterr()
    assert "still here" in out and "and here" in out


def test_loads_in_threads_leave_stdout_as_it_was() -> None:
    before, running = sys.stdout, threading.Barrier(4)

    def load() -> None:
        for _ in range(20):
            run_guarded(lambda: running.wait(10))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.stdout is before


def test_paths_arguments_and_logging_are_as_they_were_after_an_import(install, caplog) -> None:
    source = "import logging, os, sys\nos.chdir('/')\nsys.argv[1:] = ['--other']\nlogging.disable(logging.CRITICAL)\n"
    install("moves", {"moves.py": source + REWARD}, rewards={"moves": "moves:Mine"})
    install(
        "swaps",
        {"swaps.py": "import sys\nsys.argv = []\nraise RuntimeError\n" + REWARD},
        rewards={"swaps": "swaps:Mine"},
    )
    place, arguments, words = Path.cwd(), sys.argv, list(sys.argv)
    assert registry.get("reward", "moves").__name__ == "Mine"
    with pytest.raises(PluginError):
        registry.get("reward", "swaps")
    logging.getLogger("rlhf_core.test").warning("heard")
    assert Path.cwd() == place and sys.argv is arguments and sys.argv == words and "heard" in caplog.text


RAISED = {
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "SystemExit: 3": "raise SystemExit(3)",
    "GeneratorExit": "raise GeneratorExit",
    "StopIteration": "raise StopIteration",
    "CancelledError": "import asyncio\nraise asyncio.CancelledError",
    "Own: mine": "class Own(BaseException): pass\nraise Own('mine')",
    "RecursionError": "def f(): f()\nf()",
    "Evil: (its text can't be read: ValueError)": (
        "class Evil(Exception):\n    def __str__(self): raise ValueError\nraise Evil"
    ),
    "ExceptionGroup: two": "raise ExceptionGroup('two', [ValueError(), TypeError()])",
    "RuntimeError: \\x1b[31mred": "raise RuntimeError('\\x1b[31mred')",
}


@pytest.mark.parametrize("reason", RAISED)
def test_whatever_an_import_raises_is_a_reason(install, good, reason: str) -> None:
    install("odd", {"odd.py": f"{RAISED[reason]}\n{REWARD}"}, rewards={"odd": "odd:Mine"})
    with pytest.raises(PluginError) as raised:
        registry.get("reward", "odd")
    assert f"importing it raised {reason}" in str(raised.value)
    assert one("odd").status == "broken" and reason in one("odd").reason
    good_ones_are_well()


def test_a_reason_has_no_more_than_a_few_lines_of_text(install) -> None:
    install("odd", {"odd.py": f"raise RuntimeError('long ' * 100_000)\n{REWARD}"}, rewards={"odd": "odd:Mine"})
    with pytest.raises(PluginError):
        registry.get("reward", "odd")
    assert len(one("odd").reason) < 600


@pytest.mark.parametrize("body", ["import time; time.sleep(20)", "try: time.sleep(20)\nexcept BaseException: pass"])
def test_the_users_own_interrupt_passes_through(install, body: str) -> None:
    source = f"import os, signal, threading, time\nthreading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n{body}\n"
    install("slow", {"slow.py": source + REWARD}, rewards={"slow": "slow:Mine"})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        registry.get("reward", "slow")
    assert signal.getsignal(signal.SIGINT) is before
    assert one("slow").status == "ok"  # nothing is wrong with it


def test_what_the_programs_own_handler_raises_passes_through() -> None:
    class Stop(Exception):
        pass

    def handler(number, frame):
        raise Stop

    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(Stop):
            run_guarded(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(GuardedError, match=r"^ValueError: .*'x'$"):
        run_guarded(lambda: int("x"))


# What a class may be

CLASSES = {
    "a Config that raises": (
        "class Meta(type(RewardFn)):\n    @property\n    def Config(cls): raise RuntimeError('no config')\n",
        "class Mine(RewardFn, metaclass=Meta):",
        "raised RuntimeError: no config",
    ),
    "subclass checks that raise": (
        "class Meta(type(RewardFn)):\n    def __subclasscheck__(cls, other): raise RuntimeError('unchecked')\n",
        "class Mine(RewardFn, metaclass=Meta):",
        "raised RuntimeError: unchecked",
    ),
    "equality that raises": (
        "class Meta(type(RewardFn)):\n    __hash__ = type.__hash__\n    def __eq__(cls, other): raise RuntimeError('unequal')\n",
        "class Mine(RewardFn, metaclass=Meta):",
        None,
    ),
    "not a subclass": ("", "class Mine:", "not a subclass of rlhf_core.RewardFn"),
    "bases that go round": (
        "class Mine: pass\n",
        "class Mine(Mine, RewardFn, Mine):",
        "raised TypeError: duplicate base",
    ),
}


@pytest.mark.parametrize("case", CLASSES)
def test_whatever_a_class_is_hurts_nobody(install, good, case: str) -> None:
    before, line, reason = CLASSES[case]
    source = REWARD.replace("class Mine(RewardFn):", f"{before}\n\n{line}")
    if case == "a Config that raises":
        source = source.replace("    Config = BaseConfig\n", "")
    if case == "bases that go round":
        source = source.replace("class Mine: pass", "class Other: pass").replace(
            "(Mine, RewardFn, Mine)", "(RewardFn, RewardFn)"
        )
    install("odd", {"odd.py": source}, rewards={"odd": "odd:Mine"})
    if reason is None:
        assert registry.get("reward", "odd").__name__ == "Mine"
    else:
        with pytest.raises(PluginError) as raised:
            registry.get("reward", "odd")
        assert reason in str(raised.value)
        del raised
    gc.collect()  # what was refused is gone, and with it what it does to others
    assert not isinstance(print, RewardFn)
    # Its metaclass isn't asked about others either.
    install("dict", {"plain.py": REWARD.replace("(RewardFn)", "(dict)")}, rewards={"plain": "plain:Mine"})
    with pytest.raises(PluginError, match="not a subclass of"):
        registry.get("reward", "plain")
    good_ones_are_well()


def test_a_module_whose_getattr_raises_is_broken(install, good) -> None:
    source = "def __getattr__(name):\n    raise KeyboardInterrupt\n" + REWARD + "\ndel Mine\n"
    install("odd", {"odd.py": source}, rewards={"odd": "odd:Mine"})
    with pytest.raises(PluginError, match="KeyboardInterrupt"):
        registry.get("reward", "odd")
    good_ones_are_well()


def test_options_that_cannot_be_described_are_the_plugins_fault(install, capsys) -> None:
    options = "class Own(BaseConfig):\n    call: Callable[[int], int] = abs\n\n\n"
    source = REWARD.replace("class Mine", f"from collections.abc import Callable\n{options}class Mine")
    install("odd", {"odd.py": source.replace("Config = BaseConfig", "Config = Own")}, rewards={"odd": "odd:Mine"})
    assert main(["schema", "odd"]) == 5
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(
        "error[plugin] reward `odd` of odd 1.0 (odd:Mine): broken: its class can't be described"
    )


# Another process

FATAL = {
    "exits": ("import os; os._exit(3)", "importing it ended the process: exit code 3"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "importing it ended the process: SIGSEGV"),
    "kills": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "importing it ended the process: SIGKILL"),
    "hangs": ("import time; time.sleep(60)", "importing it takes longer than 3 s"),
    "raises": ("raise KeyboardInterrupt", "importing it raised KeyboardInterrupt"),
    "asks": ("input('your key? ')", "importing it raised EOFError"),
    "forks": ("import os\nif os.fork(): os._exit(0)", "importing it ended the process: exit code 0"),
    "closes": ("import os; os.closerange(3, 256)", "importing it ended the process"),
}


def test_check_outlives_whatever_an_import_does(install, monkeypatch) -> None:
    for name, (body, _) in FATAL.items():
        install(f"a-{name}", {f"fatal_{name}.py": f"{body}\n{REWARD}"}, rewards={f"a-{name}": f"fatal_{name}:Mine"})
    for letter in "bz":
        install(f"{letter}-good", {f"good_{letter}.py": REWARD}, rewards={f"{letter}-good": f"good_{letter}:Mine"})
    # It spoils the process for whoever comes later; who is loaded before and after is well all the same.
    spoil = (
        "import os, sys, signal\nos.chdir('/'); sys.path.clear(); os.environ.clear()\n"
        "sys.modules['json'] = None\nsignal.alarm(1)\n"
    )
    install("c-spoils", {"spoils.py": spoil + REWARD}, rewards={"c-spoils": "spoils:Mine"})
    monkeypatch.setenv(registry.ALLOW_VARIABLE, ",".join(p.name for p in registry.find("reward") if p.name[1] == "-"))
    checked = {p.name: p for p in registry.check("reward", seconds=3) if p.status != "disabled"}
    for name, (_, reason) in FATAL.items():
        plugin = checked.pop(f"a-{name}")
        assert plugin.status == "broken" and reason in plugin.reason, plugin
    assert {name: p.status for name, p in checked.items()} == {"b-good": "ok", "z-good": "ok", "c-spoils": "ok"}
    assert not [name for name in sys.modules if name.startswith(("fatal_", "good_"))]  # nothing was imported here
    with pytest.raises(PluginError, match="exit code 3"):  # nor is it tried here now
        registry.get("reward", "a-exits")


def test_a_check_costs_one_process_where_all_is_well(install, monkeypatch) -> None:
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k))
    for name in "abc":
        install(name, {f"mod_{name}.py": REWARD}, rewards={name: f"mod_{name}:Mine"})
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "a,b,c")
    assert {p.name for p in registry.check("reward") if p.status == "ok"} == set("abc")
    assert len(started) == 1
    assert {plugin.status for plugin in registry.check("sampler")} == {"disabled"}
    assert len(started) == 1  # what may not be loaded isn't tried


def test_a_mended_plugin_is_well_at_the_next_check(install, monkeypatch) -> None:
    root = install("acme", {"acme.py": "import os; os._exit(3)\n" + REWARD}, rewards={"mine": "acme:Mine"})
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "acme")
    assert {p.name: p.status for p in registry.check("reward")}["mine"] == "broken"
    (root / "acme.py").write_text(REWARD)
    assert {p.name: p.status for p in registry.check("reward")}["mine"] == "ok"
    assert registry.get("reward", "mine").__name__ == "Mine"


def test_ctrl_c_stops_a_check_and_what_it_started(install, tmp_path) -> None:
    begun = tmp_path / "begun"
    body = f"import os, pathlib, time\npathlib.Path({str(begun)!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    root = install("slow", {"slow.py": body + REWARD}, rewards={"slow": "slow:Mine"})
    environment = {**os.environ, "PYTHONPATH": str(root), registry.ALLOW_VARIABLE: "slow"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_core", "list", "rewards", "--check"], stderr=subprocess.PIPE, env=environment
    )
    while not (begun.exists() and begun.read_text()):
        time.sleep(0.05)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"error[interrupted]" in err and time.monotonic() - begin < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


# Ambiguous names


@pytest.mark.parametrize("body", ["raise RuntimeError('no licence')", "import os; os._exit(3)"])
def test_a_rival_that_fails_on_import_takes_nobodys_name_away(install, caplog, capsys, body: str) -> None:
    install("good", {"good.py": REWARD}, rewards={"mine": "good:Mine"})
    install("bad", {"bad.py": f"{body}\n{REWARD}"}, rewards={"mine": "bad:Mine"})
    assert {p.status for p in registry.find("reward") if p.name == "mine"} == {"conflict"}
    with caplog.at_level(logging.WARNING, "rlhf_core"):
        assert registry.get("reward", "mine").__module__ == "good"
        assert registry.rewards["mine"].__module__ == "good"
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(
        "reward `mine` means `good:mine`, because `bad:mine` is broken: importing it"
    )
    assert (one("mine", "good").status, one("mine", "bad").status) == ("ok", "broken")
    registry.forget()
    assert main(["show", "mine"]) == 0 and "good:mine" in capsys.readouterr().out


def test_after_a_failed_load_the_bare_name_means_the_other(install, caplog) -> None:
    install("good", {"good.py": REWARD}, rewards={"mine": "good:Mine"})
    root = install("bad", {"bad.py": f"raise RuntimeError\n{REWARD}"}, rewards={"mine": "bad:Mine"})
    with pytest.raises(PluginError):
        registry.get("reward", "bad:mine")
    assert one("mine", "good").status == "ok"
    assert registry.get("reward", "mine").__module__ == "good"
    assert "reward `mine` means `good:mine`" in caplog.text
    (root / "bad.py").write_text(REWARD + "# mended\n")
    assert registry.get("reward", "bad:mine").__module__ == "bad"
    with pytest.raises(PluginError, match="offered 2 times"):
        registry.get("reward", "mine")


def test_two_entry_points_of_one_name_in_one_distribution_are_told(install, good) -> None:
    root = install("acme", {"acme.py": REWARD, "other.py": REWARD}, rewards={"mine": "acme:Mine"})
    table = next(root.glob("*.dist-info/entry_points.txt"))
    table.write_text("[rlhf_core.rewards]\nmine = acme:Mine\nmine = other:Mine\n")
    with pytest.raises(PluginError, match="uninstall acme, whose entry points name it twice"):
        registry.get("reward", "acme:mine")
    good_ones_are_well()


# Distributions


def test_two_distributions_of_one_name_are_shown_with_the_one_that_is_used(install, capsys, good) -> None:
    old = install("acme", {"acme.py": REWARD}, version="1.0", rewards={"mine": "acme:Mine", "old": "acme:Mine"})
    new = install("acme", {"acme.py": REWARD}, version="2.0", rewards={"mine": "acme:Mine"})
    (fault,) = registry.faults()
    used, hidden = next(new.glob("*.dist-info")), next(old.glob("*.dist-info"))
    assert fault == (
        f"two distributions are named `acme`: 2.0 at {used} is used, 1.0 at {hidden} is not; fix: uninstall one"
    )
    assert (one("mine").status, one("mine").version) == ("ok", "2.0")
    assert main(["list", "--json"]) == 0
    out, err = capsys.readouterr()
    assert fault in err and json.loads(out)
    good_ones_are_well()


def test_one_installation_by_two_paths_is_no_fault(install, tmp_path, monkeypatch) -> None:
    root = install("acme", {"acme.py": REWARD}, rewards={"mine": "acme:Mine"})
    (tmp_path / "link").symlink_to(root)
    monkeypatch.syspath_prepend(str(tmp_path / "link"))
    # An editable installation, and the record that its build left beside the source.
    source = tmp_path / "source"
    (source / "beta.egg-info").mkdir(parents=True)
    (source / "beta.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: beta\nVersion: 0.9\n")
    (source / "beta.egg-info" / "entry_points.txt").write_text("[rlhf_core.rewards]\nbeta = beta:Mine\n")
    (source / "beta.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(source))
    site = install("beta", {}, rewards={"beta": "beta:Mine"})
    origin = {"url": source.as_uri(), "dir_info": {"editable": True}}
    (next(site.glob("*.dist-info")) / "direct_url.json").write_text(json.dumps(origin))
    assert registry.faults() == []
    assert (one("mine").status, one("beta").status) == ("ok", "ok")


TABLES = {
    "no equals sign": (
        b"[console_scripts]\nno equals sign\n",
        "line 2 of entry_points.txt is malformed: no equals sign",
    ),
    "not text": (b"[rlhf_core.rewards]\n\xff\xfe = a:B\n", "entry_points.txt: UnicodeDecodeError"),
    "an open group": (b"[rlhf_core.rewards\nx = good:Mine\n", "line 1 of entry_points.txt is malformed"),
    "an unknown group": (
        b"[rlhf_core.reward]\nx = good:Mine\n",
        "unknown entry-point group `rlhf_core.reward`; did you mean",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_malformed_table_is_told_and_blamed_on_nobody_else(install, good, capsys, case: str) -> None:
    table, reason = TABLES[case]
    root = install("odd", {}, rewards={})
    path = next(root.glob("*.dist-info"))
    (path / "entry_points.txt").write_bytes(table)
    (fault,) = registry.faults()
    assert str(path) in fault and reason in fault
    assert main(["list"]) == 0
    assert fault in capsys.readouterr().err
    good_ones_are_well()


def test_a_table_that_is_no_file_and_an_origin_that_is_no_json_are_told_or_ignored(install, good, capsys) -> None:
    root = install("odd", {}, rewards={})
    path = next(root.glob("*.dist-info"))
    (path / "entry_points.txt").unlink()
    (path / "entry_points.txt").mkdir()
    other = install("other", {"other.py": REWARD}, rewards={"other": "other:Mine"})
    (next(other.glob("*.dist-info")) / "direct_url.json").write_text("[" * 100_000)
    (fault,) = registry.faults()
    assert fault.startswith(f"the metadata at {path} can't be read: entry_points.txt: IsADirectoryError")
    assert one("other").status == "ok" and not [p for p in find_problems() if "other" in p]
    good_ones_are_well()


def test_a_malformed_line_among_our_own_is_a_broken_plugin_beside_the_good_ones(install, good) -> None:
    root = install("odd", {"odd.py": REWARD}, rewards={"mine": "odd:Mine"})
    table = next(root.glob("*.dist-info/entry_points.txt"))
    table.write_text("\ufeff; a comment\n[rlhf_core.rewards]\nmine = odd:Mine\nno equals sign\n")
    broken = one("no equals sign")
    assert broken.status == "broken" and f"line 4 of {table} isn't of the form" in broken.reason
    assert one("mine").status == "ok"
    good_ones_are_well()


@pytest.mark.slow
def test_a_table_that_breaks_the_imports_of_pydantic_and_torch_does_not_break_ours(install) -> None:
    root = install("odd", {}, rewards={})
    next(root.glob("*.dist-info/entry_points.txt")).write_text("[console_scripts]\nno equals sign\n")
    code = "from rlhf_core import registry; print(registry.get('trainer', 'sft').__name__)"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for command in (["-c", code], ["-m", "rlhf_core", "schema", "sft"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr


METADATA = {
    "missing": None,
    "nameless": b"Metadata-Version: 2.1\nVersion: 3\n",
    "not text": b"Name: \xff\xfe\nVersion: 3\n",
    "empty": b"",
    "another's": b"Metadata-Version: 2.1\nName: rlhf-core\nVersion: 3\n",
    "an escape": b"Metadata-Version: 2.1\nName: \x1b[31mred\nVersion: \x1b]0;x\x07\n",
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_without_a_name_leave_the_directorys_with_a_warning(install, good, capsys, case: str) -> None:
    root = install("odd", {"odd.py": REWARD}, rewards={"mine": "odd:Mine"})
    path = next(root.glob("*.dist-info"))
    content = METADATA[case]
    (path / "METADATA").unlink() if content is None else (path / "METADATA").write_bytes(content)
    assert (one("mine").qualified, one("mine").status) == ("odd:mine", "ok")
    (fault,) = registry.faults()
    assert fault == f"the METADATA in {path} has no valid name, or another; the directory's is used, `odd`"
    assert main(["list"]) == 0 and main(["show", "odd:mine"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\x07" not in out + err
    good_ones_are_well()


def test_what_pip_left_over_is_not_a_distribution(install, good) -> None:
    root = install("acme", {"acme.py": REWARD}, rewards={"mine": "acme:Mine"})
    path = next(root.glob("*.dist-info"))
    (root / "~cme-0.9.dist-info").mkdir()
    for file in path.iterdir():
        (root / "~cme-0.9.dist-info" / file.name).write_bytes(file.read_bytes())
    assert (one("mine").status, one("mine").version) == ("ok", "1.0")
    assert "left over from an interrupted installation" in registry.faults()[0]
    good_ones_are_well()


def test_a_record_that_is_one_file_has_its_name(install, good) -> None:
    root = install("acme", {}, rewards={})
    (root / "old-0.3.egg-info").write_text(
        "Metadata-Version: 1.1\nName: old\nVersion: 0.3\n\nName: in the description\n"
    )
    assert not [place for place, _ in unreadable_distributions() if place.startswith(str(root))]
    good_ones_are_well()


class Distributions:
    def find_distributions(self, context=None):
        raise RuntimeError("an import hook that fails")

    def find_spec(self, name, path=None, target=None):
        return None


def test_a_finder_of_distributions_that_raises_hides_nobody(install, good, monkeypatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Distributions()])
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/tmp"), 7, "/nowhere", "nul\0l"])
    good_ones_are_well()


# What is printed


def test_text_of_others_reaches_no_terminal_raw(install, capsys) -> None:
    doc = "\\x1b[31mred\\x07\\u202eback\\x9b2J\\ud800 to\\u2028 you\n\n    Second \\x1b]0;title\\x07 line."
    source = REWARD.replace("Likes what mine likes.", doc).replace(
        "class Mine", "class Own(BaseConfig):\n    size: int = 1\n    '''A \\x1b[5m blink.'''\n\n\nclass Mine"
    )
    install("loud", {"loud.py": source.replace("Config = BaseConfig", "Config = Own")}, rewards={"loud": "loud:Mine"})
    install("fails", {"fails.py": f"raise OSError('\\x1b[31m\\u202e')\n{REWARD}"}, rewards={"fails": "fails:Mine"})
    for arguments in (["list"], ["list", "--json"], ["show", "loud"], ["show", "loud", "--json"], ["schema", "fails"]):
        main(arguments)
        out, err = capsys.readouterr()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\ud800-\udfff]", out + err), arguments
    main(["show", "loud", "--json"])
    assert (
        json.loads(capsys.readouterr().out)["summary"] == eval(f"'''{doc}'''").split("\n")[0]
    )  # as it is, for programs


def test_log_lines_show_escapes_too(install, capsys, monkeypatch) -> None:
    from rlhf_core.registry.plugin_logs import setup_logging

    source = "class Listener:\n    def __init__(self): raise OSError('\\x1b[31mred\\x07')\n"
    install("odd", {"odd_hook.py": source}, hooks={"odd": "odd_hook:Listener"})
    core = logging.getLogger("rlhf_core")
    monkeypatch.setattr(core, "handlers", [])
    monkeypatch.setattr(core, "propagate", False)
    setup_logging()
    core.warning("a tensor named \x1b[2J\nand a second line")
    load_hooks()
    err = capsys.readouterr().err
    assert (
        "a tensor named \\x1b[2J\nand a second line" in err
        and "OSError: \\x1b[31mred\\x07" in err
        and "\x1b" not in err
    )


def test_printable_shows_what_a_terminal_would_act_upon() -> None:
    assert printable("plain größe 日本\u3000語 👩\u200d🔬") == "plain größe 日本\u3000語 👩\u200d🔬"
    assert printable("a\x1b[0m\x00\x7f\x9b\u202e\ufeff") == "a\\x1b[0m\\x00\\x7f\\x9b\\u202e\\ufeff"
    assert printable("a\r\nb\tc\u2028d") == "a b c d"
    assert printable("a\r\nb\tc\rd", lines=True) == "a\nb\tc d"


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["show", "wide"], ["show", "wide", "--json"]])
def test_a_terminal_without_unicode_shows_escapes(install, arguments: list[str]) -> None:
    root = install("wide", {"wide.py": REWARD.replace("Likes", "Mag größere 評")}, rewards={"wide": "wide:Mine"})
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "rlhf_core", *arguments], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    if "--json" in arguments:
        assert "größere" in json.dumps(json.loads(done.stdout), ensure_ascii=False)


# Once in a process


def test_what_is_installed_is_read_once_and_again_when_it_changes(install, monkeypatch) -> None:
    reads = []

    class Finder:
        """Knows no distribution, and counts how often all of them are asked for."""

        def find_distributions(self, context: object) -> list[object]:
            reads.append(context)
            return []

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    registry.forget()
    registry.find(), registry.find("reward"), registry.lookup("dpo"), registry.find()
    assert len(reads) == 1
    root = install("acme", {"acme.py": REWARD}, rewards={"mine": "acme:Mine"})
    assert one("mine").status == "ok" and len(reads) == 2
    monkeypatch.setenv(registry.DISABLE_VARIABLE, "mine")  # policy is applied to what was read
    assert one("mine").status == "disabled" and len(reads) == 2
    monkeypatch.delenv(registry.DISABLE_VARIABLE)
    (root / "acme.py").write_text(REWARD.replace("Likes", "Prefers"))
    assert one("mine").summary == "Prefers what mine likes." and len(reads) == 2
    table = next(root.glob("*.dist-info/entry_points.txt"))
    table.write_text("[rlhf_core.rewards]\nmine = acme:Mine\nanother = acme:Mine\n")
    assert one("another").status == "ok" and len(reads) == 3
    registry.forget()
    assert one("mine").status == "ok" and len(reads) == 4


def test_a_lookup_reads_the_sources_of_its_own_name_alone(install, monkeypatch) -> None:
    root = install("acme", {"acme.py": REWARD}, rewards={"mine": "acme:Mine"})
    opened = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    assert registry.lookup("mine").target == "acme:Mine"
    assert opened == [root / "acme.py"]


# Hooks

HOOKS = {
    "import exits": "raise SystemExit",
    "import interrupts": "raise KeyboardInterrupt",
    "making it exits": "class Listener:\n    def __init__(self): raise SystemExit(2)",
    "making it interrupts": "class Listener:\n    def __init__(self): raise KeyboardInterrupt",
    "not hashable": "class Listener:\n    __hash__ = None",
    "equality raises": (
        "class Listener:\n    __hash__ = object.__hash__\n    def __eq__(self, other): raise RuntimeError('unequal')"
    ),
    "dir raises": "class Listener:\n    def __dir__(self): raise RuntimeError('no dir')",
    "a property that raises": (
        "from rlhf_core.registry.hooks import hookimpl\nclass Listener:\n    @property\n    def x(self): raise RuntimeError\n"
        "    @hookimpl\n    def run_ended(self, result): print('ENDED')"
    ),
    "it prints": "print('HELLO')\nclass Listener:\n    def __init__(self): print('MADE')",
}


@pytest.mark.parametrize("case", HOOKS)
def test_a_hook_harms_no_run(install, caplog, capfd, case: str) -> None:
    source = HOOKS[case] if "Listener" in HOOKS[case] else f"{HOOKS[case]}\nclass Listener: pass"
    install("odd", {"odd_hook.py": source}, hooks={"odd": "odd_hook:Listener"})
    listener = (
        "from rlhf_core.plugin import hookimpl\nheard = []\n@hookimpl\ndef run_ended(result): heard.append(result)\n"
    )
    install("well", {"well_hook.py": listener}, hooks={"well": "well_hook"})
    hooks = load_hooks()
    hooks.emit("run_ended", run=None, result=7)
    import well_hook

    assert well_hook.heard == [7]
    if case not in ("a property that raises", "it prints"):
        assert "hook `odd:odd` is left out" in caplog.text and "odd:odd" not in hooks.names
    out, err = capfd.readouterr()
    if case == "it prints":
        assert "HELLO" in err and "MADE" in err and out == ""
