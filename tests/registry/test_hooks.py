"""Hooks hear every event in order, and a broken one never harms the run."""

from __future__ import annotations

import logging

import pytest

from rlhf_core import registry
from rlhf_core.registry.hooks import EVENTS, Hooks, hookimpl, load_hooks


class Recorder:
    def __init__(self) -> None:
        self.heard: list[tuple] = []

    @hookimpl
    def run_started(self, run):
        self.heard.append(("run_started", run))

    @hookimpl
    def step_ended(self, step, metrics):
        self.heard.append(("step_ended", step, metrics["loss"]))


class Raiser:
    @hookimpl
    def step_ended(self, step):
        raise RuntimeError("disk of the tracker is full")


def test_events_are_those_of_a_run() -> None:
    assert EVENTS == (
        "run_started", "step_ended", "rollouts_scored", "evaluated", "checkpoint_saved", "run_ended", "run_failed",
    )  # fmt: skip


def test_every_listener_hears_an_event() -> None:
    hooks, first, second = Hooks(), Recorder(), Recorder()
    assert hooks.add(first, "first") and hooks.add(second, "second")
    hooks.emit("run_started", run="r")
    hooks.emit("step_ended", run="r", step=1, metrics={"loss": 2.0})
    hooks.emit("evaluated", run="r", step=1, metrics={})
    assert first.heard == second.heard == [("run_started", "r"), ("step_ended", 1, 2.0)]


def test_a_listener_that_raises_is_warned_about_once_and_removed(caplog) -> None:
    hooks, before, after = Hooks(), Recorder(), Recorder()
    for name, listener in [("before", before), ("raiser", Raiser()), ("after", after)]:
        hooks.add(listener, name)
    with caplog.at_level(logging.WARNING, "rlhf_core"):
        for step in (1, 2):
            hooks.emit("step_ended", run=None, step=step, metrics={"loss": 0.0})
    assert len(before.heard) == len(after.heard) == 2
    assert hooks.names == ["before", "after"]
    warning = "hook `raiser` raised RuntimeError in step_ended and is not called again: disk of the tracker is full"
    assert [record.message for record in caplog.records] == [warning]


def test_interrupts_pass_through() -> None:
    class Interrupted:
        @hookimpl
        def run_ended(self):
            raise KeyboardInterrupt

    hooks = Hooks()
    hooks.add(Interrupted(), "i")
    with pytest.raises(KeyboardInterrupt):
        hooks.emit("run_ended", run=None, result=None)


def test_a_misspelt_event_or_argument_is_refused_with_the_nearest(caplog) -> None:
    class Misspelt:
        @hookimpl
        def step_end(self):
            pass

    class Argument:
        @hookimpl
        def step_ended(self, loss):
            pass

    hooks = Hooks()
    assert not hooks.add(Misspelt(), "misspelt") and not hooks.add(Argument(), "argument")
    assert hooks.names == []
    assert "there is no event `step_end`; did you mean `step_ended`?" in caplog.text
    assert "loss" in caplog.text
    with pytest.raises(ValueError, match="did you mean `step_ended`"):
        hooks.emit("step_end")


def test_adding_twice_keeps_the_first() -> None:
    hooks, listener = Hooks(), Recorder()
    assert hooks.add(listener, "one") and not hooks.add(Recorder(), "one") and not hooks.add(listener, "two")
    assert hooks.names == ["one"]


MODULE = """
from rlhf_core.registry.hooks import hookimpl
heard = []

@hookimpl
def run_ended(result):
    heard.append(result)
"""


def test_installed_hooks_load_one_by_one(install, caplog, monkeypatch) -> None:
    install("good", {"good_hooks.py": '"""Hears the end."""\n' + MODULE}, hooks={"end": "good_hooks"})
    install("bad", {"bad_hooks.py": "raise RuntimeError('old libc')"}, hooks={"bad": "bad_hooks"})
    ctor = "class Listener:\n    def __init__(self):\n        raise ValueError('no key')\n"
    install("worse", {"worse_hooks.py": ctor}, hooks={"end": "worse_hooks:Listener"})
    install("off", {"off_hooks.py": MODULE}, hooks={"off": "off_hooks"})
    monkeypatch.setenv(registry.DISABLE_VARIABLE, "off")
    by_name = {p.qualified: p for p in registry.find("hook")}
    assert by_name["good:end"].summary == "Hears the end."
    assert by_name["good:end"].status == "ok"  # many may listen under one name
    hooks = load_hooks()
    assert hooks.names == ["good:end", "rlhf-core:report"]
    assert "hook `bad:bad` is left out, and the run continues without it" in caplog.text and "old libc" in caplog.text
    assert "ValueError: no key" in caplog.text
    hooks.emit(
        "run_ended", run=None, result=7
    )  # the core's own hook, to which that is no run, is left out from here on
    import good_hooks

    assert good_hooks.heard == [7]


def test_a_hook_registered_in_this_process_listens() -> None:
    listener = Recorder()
    registry.register("hook", "mine", listener)
    hooks = load_hooks()
    hooks.emit("run_started", run=1)
    assert listener.heard == [("run_started", 1)]
