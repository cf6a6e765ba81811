"""The hook that writes a run's report: when it does, and that a fault in it ends no run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rlhf_plugins.hooks import run_report
from rlhf_plugins.hooks.run_report import RunReportHook
from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer

from rlhf_core.infra.errors import NumbersError, Stopped
from rlhf_core.testing.tiny import save_tiny


class Clock:
    """Time that passes when it is told to, and while a report is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
        self.now, self.cost = 1000.0, cost
        self.written: list[float] = []
        monkeypatch.setattr(run_report, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(run_report, "write_report", self.write)

    def write(self, directory: Path) -> None:
        self.written.append(self.now - 1000)
        self.now += self.cost


def run_of(asked: bool | None, output: str | None = "run") -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(logging=SimpleNamespace(report=asked)), output=None if output is None else Path(output)
    )


def evaluate_every(seconds: float, count: int, hook: RunReportHook, clock: Clock, run: Any) -> None:
    for step in range(count):
        clock.now += seconds
        hook.evaluated(run=run, step=step, metrics={})


def test_evaluations_write_it_within_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, hook, run = Clock(monkeypatch, cost=4.0), RunReportHook(), run_of(None)
    hook.run_started(run=run)
    evaluate_every(10, 100, hook, clock, run)
    # The first after a minute; then 4 s are a fiftieth of 200.
    assert clock.written[0] == 60
    assert [later - before for before, later in zip(clock.written, clock.written[1:], strict=False)] == [204.0] * 4
    before = len(clock.written)
    hook.run_ended(run=run, result=None)
    assert len(clock.written) == before + 1


@pytest.mark.parametrize(("asked", "seconds", "written"), [(None, 59, 0), (None, 61, 1), (True, 1, 1), (False, 100, 0)])
def test_the_end_writes_it_as_asked(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, seconds: float, written: int
) -> None:
    clock, hook = Clock(monkeypatch, cost=1.0), RunReportHook()
    hook.run_started(run=run_of(asked))
    clock.now += seconds
    hook.run_ended(run=run_of(asked), result=None)
    hook.run_ended(run=run_of(asked, output=None), result=None)  # nowhere to write
    assert len(clock.written) == written


@pytest.mark.parametrize(
    ("error", "written"), [(NumbersError("loss isn't finite"), 1), (Stopped("stopped"), 0), (KeyboardInterrupt(), 0)]
)
def test_a_failure_writes_it_and_a_stop_does_not(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, written: int
) -> None:
    clock, hook = Clock(monkeypatch, cost=1.0), RunReportHook()
    hook.run_started(run=run_of(True))
    hook.run_failed(run=run_of(True), error=error)
    assert len(clock.written) == written


def train(path: Path) -> Path:
    config = SFTConfig(max_steps=2, batch_size=2, learning_rate=1e-3, logging={"report": True})
    rows = [{"prompt": f"{one}+1=", "response": str(one + 1)} for one in range(4)]
    SFTTrainer(config, model=save_tiny(path / "start", 0), data=rows, eval_data=rows, output=path / "run").train()
    return path / "run"


def test_a_run_leaves_its_report(tmp_path: Path) -> None:
    page = (train(tmp_path) / "report.html").read_text(encoding="utf-8")
    assert '<dd class="good">done</dd>' in page and "2 of 2" in page


def test_a_fault_in_the_report_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(directory: Path) -> None:
        raise OSError("no room")

    monkeypatch.setattr(run_report, "write_report", broken)
    run = train(tmp_path)
    assert (run / "model/model.safetensors").exists() and not (run / "report.html").exists()
    assert "hook `rlhf-core:report` raised OSError" in caplog.text
