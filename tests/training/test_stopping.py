"""A request to stop (Ctrl-C or SIGTERM) loses nothing, wherever it comes; a second Ctrl-C doesn't wait."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import ROWS, ToyTrainer, toy

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Loss
from rlhf_core.infra.errors import ConfigError, Stopped
from rlhf_core.infra.files import read_json
from rlhf_core.testing.tiny import save_tiny
from rlhf_core.training.logger import without_timing

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
EVALUATED: dict[str, Any] = {"eval_rows": ROWS[:8], "eval_steps": 2}


class Asked(ToyTrainer):
    """Is sent a signal, so many times, where `when` says so."""

    number, times = signal.SIGINT, 1

    @staticmethod
    def when(trainer: Asked) -> bool:
        return False

    def loss(self, batch: Batch) -> Loss:
        if type(self).when(self) and type(self).times:
            type(self).times -= 1
            os.kill(os.getpid(), self.number)
            if type(self).when(self) and type(self).times:
                type(self).times -= 1
                os.kill(os.getpid(), self.number)
        return super().loss(batch)


def asked(when: Callable[[Asked], bool], number: signal.Signals = signal.SIGINT, times: int = 1) -> type[Asked]:
    return type("Asked", (Asked,), {"number": number, "times": times, "when": staticmethod(when)})


def in_step_three(trainer: Asked) -> bool:
    return trainer.windows == 3 and not trainer.evaluating


def in_the_second_evaluation(trainer: Asked) -> bool:
    return trainer.evaluating and bool(trainer.models["policy"].seen > 16)


def outcome(output: Path) -> tuple[list[dict[str, Any]], bytes]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    untimed = [without_timing(row) for row in rows]
    return untimed, (output / "model" / "model.safetensors").read_bytes()


@SIGNALS
def test_the_step_is_finished_and_saved(tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture) -> None:
    before = signal.getsignal(number)
    kind = asked(in_step_three, number)
    with pytest.raises(Stopped, match="stopped after step 3; its state is saved") as caught:
        toy(tmp_path / "run", kind=kind, **EVALUATED).train()
    assert caught.value.exit_code == 75 and signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]
    assert "finishes this step, saves it and stops" in capfd.readouterr().err
    assert read_json(tmp_path / "run" / "status.json")["exit_code"] == 75
    toy(tmp_path / "run", kind=kind, **EVALUATED).train(resume=True)
    toy(tmp_path / "whole", **EVALUATED).train()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    trainer = toy(tmp_path, kind=asked(in_step_three, times=2), checkpoint={"every": 2})
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert caught.value.__notes__ == ["after step 2: `resume=True` continues from the checkpoint of step 2"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    assert read_json(tmp_path / "status.json")["exit_code"] == 130
    assert toy(tmp_path, kind=asked(in_step_three, times=0), checkpoint={"every": 2}).train(resume=True).step == 6


@SIGNALS
def test_an_evaluation_is_left_at_once_and_made_on_resume(tmp_path: Path, number: signal.Signals) -> None:
    kind = asked(in_the_second_evaluation, number)
    with pytest.raises(Stopped, match="stopped after step 4; its state is saved"):
        toy(tmp_path / "run", kind=kind, **EVALUATED).train()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 4 and "eval_loss" not in row and "seconds" in row
    toy(tmp_path / "run", kind=kind, **EVALUATED).train(resume=True)
    toy(tmp_path / "whole", **EVALUATED).train()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@SIGNALS
def test_the_export_is_left_at_once_and_made_on_resume(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy(tmp_path)
    save = type(trainer.model).save_pretrained
    monkeypatch.setattr(
        type(trainer.model), "save_pretrained", lambda self, where: (os.kill(os.getpid(), number), save(self, where))
    )
    with pytest.raises(Stopped, match="stopped after step 6; its state is saved"):
        trainer.train()
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    toy(tmp_path).train(resume=True)
    assert (tmp_path / "model" / "model.safetensors").exists() and not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize("place", ["build", "inspect"])
def test_loading_is_left_at_once(tmp_path: Path, place: str) -> None:
    def hit(self: ToyTrainer, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not at once")

    kind = type("Loading", (Asked,), {place: hit})
    with pytest.raises(KeyboardInterrupt) as caught:
        toy(tmp_path, kind=kind).train()
    assert caught.value.__notes__ == ["before its first step"]
    assert read_json(tmp_path / "status.json")["exit_code"] == 130
    assert toy(tmp_path, kind=type("Loading", (Asked,), {})).train(resume=True).step == 6


def test_without_a_directory_there_is_nothing_to_wait_for() -> None:
    trainer = toy(kind=asked(in_step_three))
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert trainer.windows == 3 and caught.value.__notes__ == ["after step 2, with no checkpoint to continue from"]


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert toy(tmp_path, kind=asked(in_step_three)).train().step == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_checkpoints_are_taken_by_time(tmp_path: Path) -> None:
    toy(tmp_path / "often", checkpoint={"minutes": 1e-9, "keep": 9}).train()
    toy(tmp_path / "seldom").train()
    saved = {name: sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) for name in ("often", "seldom")}
    assert saved == {"often": [f"step-{step}" for step in range(1, 7)], "seldom": ["step-6"]}
    assert outcome(tmp_path / "often") == outcome(tmp_path / "seldom")


def test_checkpoints_by_time_need_a_directory() -> None:
    toy(max_steps=1).train()
    with pytest.raises(ConfigError, match=r"checkpoint.minutes: there is no directory for checkpoints"):
        toy(max_steps=1, checkpoint={"minutes": 5.0}).train()


def command(tmp_path: Path, *options: str) -> subprocess.Popen[bytes]:
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    save_tiny(model)
    data.write_text("".join(json.dumps({"prompt": "2 + 3 =", "response": " 5" * 400}) + "\n" for _ in range(128)))
    arguments = [
        "train",
        "sft",
        "--model",
        str(model),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
        *options,
    ]
    # A shell that starts its jobs in the background has them ignore the signal; a terminal doesn't.
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    return subprocess.Popen(
        [sys.executable, "-c", f"{heard} from rlhf_core.cli import main; sys.exit(main(sys.argv[1:]))", *arguments],
        stderr=(tmp_path / "errors.txt").open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def errors_of(process: subprocess.Popen[bytes], tmp_path: Path) -> str:
    """Return what a process wrote to stderr until it ended."""
    process.wait(timeout=60)
    return (tmp_path / "errors.txt").read_text()


def wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 120
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"no {text!r} in {path}"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("presses", "code"), [(1, 75), (2, 130)])
def test_ctrl_c_on_the_command_line(tmp_path: Path, presses: int, code: int) -> None:
    # Steps of some seconds, for the second press to come before the end of one.
    process = command(tmp_path, "--max_steps", "100000", "--max_length", "768", "--batch_size", "128")
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 1')
    time.sleep(0.3)  # into the second step: a press that comes before the end of the first one stops the run there
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        wait_for(tmp_path / "errors.txt", "press Ctrl-C again")
    errors = errors_of(process, tmp_path)
    assert process.returncode == code, errors
    assert "Traceback" not in errors and "press Ctrl-C again to stop at once" in errors
    end = errors.strip().splitlines()[-1]
    if presses == 1:
        assert re.fullmatch(r"error\[stopped\] .*: stopped after step \d+; its state is saved; fix: .*--resume`", end)
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    else:
        assert re.fullmatch(r"error\[interrupted\] stopped by Ctrl-C; after step \d+, .*", end)


@pytest.mark.slow
def test_ctrl_c_while_it_loads(tmp_path: Path) -> None:
    process = command(tmp_path, "--max_steps", "100000")
    wait_for(tmp_path / "run" / "run.json", '"running"')
    process.send_signal(signal.SIGINT)
    errors = errors_of(process, tmp_path)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == "error[interrupted] stopped by Ctrl-C; before its first step"
