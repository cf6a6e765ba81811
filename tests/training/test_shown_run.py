"""What `trainer.train()` shows: lines and a summary without any set-up, once, and nothing where it is to be quiet."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from toy import toy

from rlhf_core.contracts.result import TrainResult
from rlhf_core.infra.log import LOGGER
from rlhf_core.registry.plugin_logs import setup_logging, shown_logs
from rlhf_core.training.run_summary import summary_lines


@pytest.fixture
def no_root_handlers() -> object:
    """A root logger as in a new script; pytest's own handlers come back afterwards."""
    root = logging.getLogger()
    handlers, root.handlers[:] = list(root.handlers), []
    yield
    root.handlers[:] = handlers


@pytest.mark.usefixtures("no_root_handlers")
def test_a_script_shows_steps_and_a_summary_without_set_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(LOGGER)
    before = logger.level, logger.propagate, list(logger.handlers)
    toy(tmp_path / "run", max_steps=2).train()
    out, err = capfd.readouterr()
    lines = [line.split(" ", 1)[1] for line in err.splitlines()]
    assert out == "" and sum(line.startswith("step ") for line in lines) == 2
    assert lines[-3].startswith("done: 2 steps, ") and lines[-1] == f"run: {tmp_path / 'run'}"
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


@pytest.mark.usefixtures("no_root_handlers")
def test_quiet_shows_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toy(tmp_path / "run", max_steps=2).train(quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_root_handlers")
def test_logging_that_is_set_up_shows_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    toy(max_steps=1).train()
    assert capsys.readouterr().err.count("step 1/1") == 1


def test_what_the_root_logger_shows_is_not_shown_twice(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    core = logging.getLogger(LOGGER)
    with shown_logs():
        core.info("a line")
        core.warning("a doubt")
    core.info("later")
    assert caplog.messages == ["a doubt"]
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["a line"]
    with caplog.at_level(logging.INFO), shown_logs():
        core.info("for all")
    assert caplog.messages == ["a doubt", "for all"] and capsys.readouterr().err == ""
    with caplog.at_level(logging.INFO, f"{LOGGER}.part"), shown_logs():
        core.getChild("part").info("of a part")
    assert "of a part" in caplog.messages and capsys.readouterr().err == ""


def test_a_summary_shows_the_evaluation_of_an_earlier_step_alone() -> None:
    metrics = {"eval_loss": 0.5}
    last = TrainResult(4, eval_metrics=metrics, tokens=1000, seconds=2, model_step=4)
    assert summary_lines(last) == ["done: 4 steps, 1,000 tokens, 2.0 s"]
    best = TrainResult(4, eval_metrics=metrics, model_dir=Path("r/model"), output=Path("r"), model_step=2, best_step=2)
    assert summary_lines(best)[1:] == [
        "evaluation of step 2", "  eval_loss  0.5000", "model: r/model (of step 2, the best)", "run: r",
    ]  # fmt: skip
