"""Work side by side: what comes back, in processes and in threads, and what faults and kills leave."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from rlhf_core.infra.errors import ModelError, RemoteError, StorageError
from rlhf_core.infra.forked_calls import may_fork
from rlhf_core.merging.workers import Advance, spread

both = pytest.mark.parametrize("forked", [True, False], ids=["processes", "threads"])
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@both
@pytest.mark.parametrize("count", [1, 3, 50])
def test_every_item_is_done_once_and_every_byte_told(forked: bool, count: int) -> None:
    def work(item: int, advance: Advance) -> None:
        assert torch.get_num_threads() == 1 and torch.is_inference_mode_enabled()
        for _ in range(item):
            advance(10)

    events = list(spread(range(20), work, count, forked=forked))
    assert sorted(item for item, nbytes in events if nbytes is None) == list(range(20))
    for item in range(20):
        found = [nbytes for one, nbytes in events if one == item]
        assert sum(nbytes or 0 for nbytes in found) == 10 * item
        assert found[-1] is None  # the end comes last


@both
def test_nothing_to_do_is_done(forked: bool) -> None:
    assert list(spread([], lambda item, advance: None, 2, forked=forked)) == []


def test_processes_are_others_and_enter_once_each(tmp_path: Path) -> None:
    def note(what: str) -> None:
        (tmp_path / f"{what}-{os.getpid()}-{time.monotonic_ns()}").touch()

    def work(item: int, advance: Advance) -> None:
        note("work")
        time.sleep(0.05)

    list(spread(range(8), work, 2, forked=True, enter=lambda: note("enter")))
    entered = [path.name.split("-")[1] for path in tmp_path.glob("enter-*")]
    worked = {path.name.split("-")[1] for path in tmp_path.glob("work-*")}
    assert len(entered) == 2 and worked == set(entered) and str(os.getpid()) not in worked


@both
def test_a_fault_comes_back_as_it_was_raised_and_ends_the_rest(forked: bool, tmp_path: Path) -> None:
    def work(item: int, advance: Advance) -> None:
        if item == 0:
            time.sleep(0.1)
            raise ModelError("holds values that are not finite", place="a", got="nan", fix="mend it")
        for _ in range(1000):
            time.sleep(0.01)
            advance(1)
        (tmp_path / str(item)).touch()

    began = time.monotonic()
    with pytest.raises(ModelError, match="a: holds values that are not finite; got nan; fix: mend it"):
        list(spread(range(4), work, 2, forked=forked))
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


def test_a_bug_comes_back_with_the_lines_where_it_was_raised() -> None:
    def work(item: int, advance: Advance) -> None:
        raise ZeroDivisionError("by nought")

    with pytest.raises(RemoteError, match="ZeroDivisionError: by nought") as caught:
        list(spread([0], work, 1, forked=True))
    assert "in work\n" in caught.value.__notes__[0]
    with pytest.raises(ZeroDivisionError):
        list(spread([0], work, 1, forked=False))


class OfItsOwn(ModelError):
    """A fault that is made in a way of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(f"number {number} is bad")


def test_faults_and_errors_of_the_system_stay_what_they_are() -> None:
    def work(item: int, advance: Advance) -> None:
        if item == 0:
            raise PermissionError(errno.EACCES, "Permission denied", "there.bin")
        if item == 1:
            raise OfItsOwn(7)
        raise StorageError("no room", place="here")

    with pytest.raises(PermissionError, match=r"there\.bin"):
        list(spread([0], work, 1, forked=True))
    with pytest.raises(RemoteError, match="OfItsOwn: number 7 is bad"):
        list(spread([1], work, 1, forked=True))
    with pytest.raises(StorageError, match="here: no room") as caught:
        list(spread([2], work, 1, forked=True))
    assert "in work\n" in caught.value.__notes__[0]


def test_a_fault_on_entering_is_told() -> None:
    def enter() -> None:
        raise StorageError("can't be let go of")

    with pytest.raises(StorageError, match="can't be let go of"):
        list(spread(range(3), lambda item, advance: None, 2, forked=True, enter=enter))


def test_a_process_killed_between_two_items_is_told() -> None:
    def work(item: int, advance: Advance) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()

    with closing(spread(range(6), work, 2, forked=True)) as events:
        with pytest.raises(StorageError, match="ended before its work did; got SIGKILL"):
            for _ in events:
                time.sleep(0.3)


def test_a_process_that_someone_forked_keeps_none_waiting() -> None:
    """It has the parent's ends of the pipes, so that hanging up isn't noticed."""
    sleeper = None
    began = time.monotonic()
    for _ in spread(range(4), lambda item, advance: None, 2, forked=True):
        if sleeper is None:
            sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
            sleeper.start()
    assert sleeper is not None
    sleeper.kill()
    sleeper.join()
    assert time.monotonic() - began < 20


def test_without_room_for_processes_threads_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    events = list(spread(range(5), lambda item, advance: advance(1), 2, forked=True))
    assert sum(nbytes is None for _, nbytes in events) == 5


@both
def test_without_a_free_descriptor_this_thread_does_it(forked: bool) -> None:
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        events = list(spread([1, 2], lambda item, advance: advance(item), 2, forked=forked))
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert events == [(1, 1), (1, None), (2, 2), (2, None)]


def test_a_process_that_is_killed_is_told() -> None:
    def work(item: int, advance: Advance) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        StorageError, match="ended before its work did; got SIGKILL; fix: where memory was short, set fewer `threads`"
    ):
        list(spread(range(3), work, 2, forked=True))


@both
def test_left_before_its_end_it_gives_up(forked: bool, tmp_path: Path) -> None:
    def work(item: int, advance: Advance) -> None:
        for _ in range(1000):
            time.sleep(0.01)
            advance(1)
        (tmp_path / str(item)).touch()

    began = time.monotonic()
    with closing(spread(range(4), work, 2, forked=forked)) as events:
        next(events)
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


ORPHANS = """
import os, sys, time
from rlhf_core.merging.workers import spread
def work(item, advance):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(1000)
list(spread(range(2), work, 2, forked=True))
"""


def test_processes_end_with_their_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        try:
            pids = [int(parent.stdout.readline()) for _ in range(2)]
        finally:
            parent.kill()
    until = time.monotonic() + 10
    while (alive := [pid for pid in pids if _runs(pid)]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive


def _runs(pid: int) -> bool:
    """Tell whether a process is there and not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_with_threads_is_not_forked() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert not may_fork()
    finally:
        done.set()
        thread.join()
