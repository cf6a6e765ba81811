"""Rows, events, console lines, trackers."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest
from toy import toy

from rlhf_core.config.training import LoggingConfig
from rlhf_core.infra.errors import ConfigError
from rlhf_core.training.logger import TrainingLogger
from rlhf_core.training.trackers import Trackers

ROW = {
    "step": 2,
    "loss": 0.5,
    "learning_rate": 1e-3,
    "grad_norm": 1.0,
    "tokens": 10,
    "seconds": 0.1,
    "tokens_per_second": 1e2,
}


def test_values_that_json_cannot_name_become_null(tmp_path: Path) -> None:
    TrainingLogger(tmp_path).metrics({**ROW, "kl": float("nan"), "ratio": float("inf")})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["kl"] is None and row["ratio"] is None and row["loss"] == 0.5


def test_an_event_is_never_glued_to_half_a_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "ha')
    TrainingLogger(tmp_path).event("run_resumed", step=3)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[0] == '{"event": "ha' and json.loads(lines[1])["step"] == 3


def test_rewind_keeps_whole_rows_up_to_a_step(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path)
    for step in (1, 2, 3):
        logger.metrics({**ROW, "step": step})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('not json\n{"step": 2}')
    logger.rewind(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_lines_come_every_so_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    logger = TrainingLogger(None, LoggingConfig(every=2), total_steps=5)
    with caplog.at_level(logging.INFO, logger="rlhf_core"):
        for step in range(1, 6):
            logger.metrics({**ROW, "step": step, "margin": 0.25})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert lines[0] == "step 2/5  loss 0.5000  margin 0.25  lr 1.0e-03  grad 1  100 tokens/s"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path, enabled=False)
    logger.metrics(ROW)
    logger.event("x")
    assert list(tmp_path.iterdir()) == []


def test_no_bar_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toy(tmp_path / "run", max_steps=2).train()
    captured = capfd.readouterr()
    assert captured.out == "" and "\x1b" not in captured.err and "━" not in captured.err


class Terminal(io.StringIO):
    """Keeps what is drawn on a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_with_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    logger = TrainingLogger(None, total_steps=4)
    logger.metrics(ROW)
    logger.close()
    text = screen.getvalue()
    assert "2/4" in text and "loss 0.5000" in text and "100 tokens/s" in text
    silent = TrainingLogger(None, LoggingConfig(progress=False), total_steps=4)
    silent.metrics(ROW)
    silent.close()
    assert screen.getvalue() == text


def test_tensorboard_mirrors_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy(tmp_path / "run", max_steps=3, logging={"trackers": ["tensorboard"], "project": "toys"}).train()
    directory = tmp_path / "run" / "trackers" / "toys"
    mirrored = EventAccumulator(str(directory)).Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in mirrored.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in mirrored.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])


def test_a_tracker_without_a_directory_is_refused() -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(ConfigError, match="tensorboard needs a run directory"):
        toy(logging={"trackers": ["tensorboard"]}).train()


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")

    def broken(*_: object, **__: object) -> None:
        raise OSError("no network")

    trackers = Trackers(("tensorboard",), project="p", output=tmp_path, options={})
    monkeypatch.setattr("accelerate.Accelerator.log", broken)
    trackers.log(ROW, 2)
    trackers.log(ROW, 3)
    assert caplog.text.count("no network") == 1
