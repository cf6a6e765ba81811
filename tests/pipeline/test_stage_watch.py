"""What people see while a stage runs, and what a kill leaves of its time."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_core.pipeline.stage_command import InProcesses
from rlhf_core.pipeline.stage_watch import StageWatch
from rlhf_core.training.signals import StopSignal

STEP = "12:00:01 step 20/450  loss 1.4464  lr 2.5e-03\n"


class Clock:
    """The time of a test; `wait` passes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, watch: StageWatch, seconds: float) -> None:
        self.now += seconds
        watch.tick()


class Screen(io.StringIO):
    """A terminal's stderr."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@contextmanager
def watching(told: list[str], noted: list[tuple[str, float]], *, shows: bool = True) -> Iterator[StageWatch]:
    watch = StageWatch(lambda name, seconds: noted.append((name, seconds)), told.append, shows=shows)
    watch.stage_begun("sft", "[1/9] sft", spent=5)
    watch.begin("train")
    yield watch
    watch.stage_ended()


def test_without_a_terminal_a_line_now_and_then_says_how_far(clock: Clock) -> None:
    told: list[str] = []
    with watching(told, []) as watch:
        clock.wait(watch, 29)
        assert told == []
        clock.wait(watch, 1)
        watch.line(STEP)
        watch.line("  eval_loss  0.0832\n")  # a table's line, which says nothing alone
        clock.wait(watch, 29)
        clock.wait(watch, 1)
        watch.line("12:01:00 step 0  the best completions of some prompts:\n")
        watch.begin("test-capabilities")
        clock.wait(watch, 30)
    clock.wait(watch, 300)
    assert told == [
        "[1/9] sft · 30 s · rlhf train",
        "[1/9] sft · 1 min 00 s · step 20/450 loss 1.4464 lr 2.5e-03",
        "[1/9] sft · 1 min 30 s · rlhf test-capabilities",
    ]


def test_a_terminal_has_one_line_that_is_renewed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    told: list[str] = []
    with watching(told, []) as watch:
        clock.wait(watch, 1)
        watch.line(STEP)
        watch.line("12:00:02 \x1b[2Jcleared [bold]\n")
        clock.wait(watch, 1)
        watch.hide()
        drawn = screen.getvalue()
        assert "[1/9] sft · 1 s · rlhf train" in drawn and "\\x1b[2Jcleared" in drawn and "\x1b[2J" not in drawn
        watch.line(STEP)
        clock.wait(watch, 1)
        assert "step 20/450 loss" in screen.getvalue() and "lr 2.5e-03" not in screen.getvalue()  # cut at 40 columns
    assert told == [] and screen.getvalue().endswith("\x1b[2K")


def test_time_is_noted_for_a_resume_whether_or_not_anything_is_shown(clock: Clock) -> None:
    told: list[str] = []
    noted: list[tuple[str, float]] = []
    with watching(told, noted, shows=False) as watch:
        for _ in range(100):
            clock.wait(watch, 1)
    assert told == [] and noted[:2] == [("sft", 15.0), ("sft", 25.0)] and len(noted) == 10


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own_is_watched(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watch:
        def begin(self, command: str) -> None:
            seen.append(f"begin {command}")

        def line(self, text: str) -> None:
            seen.append(text)

        def tick(self) -> None:
            seen.append("tick")

    with StopSignal(speak=False) as stop:
        run = InProcesses(stop)
        run.watch = Watch()
        with pytest.raises(Exception, match="no-such-method"):
            run(["train", "no-such-method"], log=tmp_path / "log")
    assert seen[0] == "begin train" and "tick" in seen and any("error[" in line for line in seen)
