"""Calls in child processes: each fails alone, whatever it does, from whatever thread, and no child outlives its owner."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlhf_core.infra.child_calls import CallFailure, ChildCalls
from rlhf_core.infra.errors import ConfigError, RemoteError

HERE = Path(__file__).parent
FUNCTIONS = "infra.called_in_children"


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        ("loop", CallFailure("time")),
        ("take all memory", CallFailure("memory")),
        ("exit", CallFailure("crash", "exit code 3")),
        ("crash", CallFailure("crash", "SIGSEGV")),
        ("raise", CallFailure("error", "KeyError: 'answer'")),
        ("return no JSON", CallFailure("error", "TypeError: Object of type set is not JSON serializable")),
        ("print", "print"),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of signals and limits of memory are Linux's")
def test_a_call_fails_alone(how: str, failure: object) -> None:
    calls = ChildCalls(f"{FUNCTIONS}:misbehave", seconds=0.5, memory=1 << 32)
    assert calls([["before"], [how], ["after"]]) == ["before", failure, "after"]


def test_a_call_that_waits_may_take_longer_by_the_clock() -> None:
    calls = ChildCalls(f"{FUNCTIONS}:misbehave", seconds=0.1)
    begin = time.monotonic()
    assert calls([["sleep"], ["after"]]) == [CallFailure("time"), "after"]
    assert 1 < time.monotonic() - begin < 15


def test_a_function_is_called_when_a_child_starts() -> None:
    calls = ChildCalls(f"{FUNCTIONS}:was_set_up", setup=f"{FUNCTIONS}:set_up", seconds=1)
    assert calls([[]]) == [True]
    with pytest.raises(RemoteError, match="no library"):
        ChildCalls(f"{FUNCTIONS}:was_set_up", setup=f"{FUNCTIONS}:fail_to_set_up", seconds=1).start()


def test_a_call_that_holds_the_interpreters_lock_ends_in_a_thread() -> None:
    calls = ChildCalls(f"{FUNCTIONS}:misbehave", seconds=0.3)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(calls([["hold the interpreter's lock"], ["after"]])))
    begin = time.monotonic()
    thread.start()
    thread.join(20)
    assert found == [CallFailure("time"), "after"] and time.monotonic() - begin < 15


def test_outcomes_are_in_order_from_several_children() -> None:
    calls = ChildCalls(f"{FUNCTIONS}:double", seconds=5, processes=2)
    assert calls([[number] for number in range(100)]) == [2 * number for number in range(100)]
    assert calls([]) == []
    assert calls([["é\ud800\n"]]) == ["é\ud800\n" * 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_children_are_used_again_and_by_several_threads(processes: int) -> None:
    calls = ChildCalls(f"{FUNCTIONS}:process_id", seconds=5, processes=processes)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.extend(calls([[], []]))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10 and 1 <= len(set(found)) <= processes
    calls.close()
    assert not psutil.pid_exists(found[0])
    assert calls([[]]) != found[:1]


@pytest.mark.parametrize(
    ("function", "said"), [("infra.called_in_children:doubel", "double"), ("no_such_module_x:f", "no_such_module_x")]
)
def test_a_function_that_cannot_be_imported_is_an_error(function: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ChildCalls(function, seconds=1).start()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how a killed process's pipes are closed is POSIX's")
def test_children_end_with_their_parent_idle_or_busy() -> None:
    code = f"""
import sys, threading; sys.path.insert(0, {str(HERE.parent)!r})
from rlhf_core.infra.child_calls import ChildCalls
idle, busy = ChildCalls("{FUNCTIONS}:process_id", seconds=1), ChildCalls("{FUNCTIONS}:misbehave", seconds=1)
busy.start()
print(idle([[]])[0], busy._idle[0].process.pid, flush=True)
busy([["hold the interpreter's lock"]] * 50)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
