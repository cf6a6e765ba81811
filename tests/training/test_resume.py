"""A run that is killed and resumed ends with the bits of the run that never was."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from toy import ROWS, ToyTrainer, toy
from transformers import PreTrainedTokenizerFast

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Loss
from rlhf_core.infra.errors import ConfigError, DataError, ModelError
from rlhf_core.training import logger


class Crash(Exception):
    pass


class Crashing(ToyTrainer):
    """Ends with an error in its fifth window, once."""

    armed = True

    def loss(self, batch: Batch) -> Loss:
        if self.windows == 5 and self.armed:
            raise Crash
        return super().loss(batch)


def without_timing(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [logger.without_timing(row) for row in rows]


def crashed(output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    with pytest.raises(Crash):
        toy(output, kind=Crashing, **options).train()
    monkeypatch.setattr(Crashing, "armed", False)


def model_bytes(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, precision: str
) -> None:
    options: dict[str, Any] = {
        "checkpoint": {"every": 2},
        "max_steps": 8,
        "precision": precision,
        "micro_batch_size": 3,
        "eval_rows": ROWS[:8],
        "eval_steps": 3,
        "dataset": {"streaming": streaming, "shuffle_block": 16},
    }
    crashed(tmp_path / "crashed", monkeypatch, **options)
    assert len(without_timing(tmp_path / "crashed")) == 4
    result = toy(tmp_path / "crashed", kind=Crashing, **options).train(resume=True)
    whole = toy(tmp_path / "whole", kind=Crashing, **options).train()
    assert without_timing(tmp_path / "crashed") == without_timing(tmp_path / "whole")
    assert model_bytes(tmp_path / "crashed") == model_bytes(tmp_path / "whole")
    assert result.tokens == whole.tokens and result.eval_metrics == whole.eval_metrics


def test_a_resume_tokenises_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    seen: list[str] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        seen.extend(one for one in ([text] if isinstance(text, str) else text) if "of a row" in one)
        return call(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    rows = [{"prompt": f"of a row {i}", "response": "yes"} for i in range(300)]
    options: dict[str, Any] = {"rows": rows, "checkpoint": {"every": 2}, "max_steps": 8}
    crashed(tmp_path / "crashed", monkeypatch, **options)
    assert len(seen) == 300
    seen.clear()
    toy(tmp_path / "crashed", kind=Crashing, **options).train(resume=True)
    assert seen == []
    datasets.disable_caching()
    try:
        toy(tmp_path / "whole", kind=Crashing, **options).train()
    finally:
        datasets.enable_caching()
    assert len(seen) == 300
    assert without_timing(tmp_path / "crashed") == without_timing(tmp_path / "whole")
    assert model_bytes(tmp_path / "crashed") == model_bytes(tmp_path / "whole")
    assert (tmp_path / "crashed/data.json").read_bytes() == (tmp_path / "whole/data.json").read_bytes()


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed(tmp_path, monkeypatch, checkpoint={"every": 3})
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    toy(tmp_path, kind=Crashing, checkpoint={"every": 3}).train(resume=True)
    assert [row["step"] for row in without_timing(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed(tmp_path / "a", monkeypatch)
    toy(tmp_path / "a", kind=Crashing).train(resume=True)
    toy(tmp_path / "b", kind=Crashing).train()
    assert without_timing(tmp_path / "a") == without_timing(tmp_path / "b")
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")


def test_a_damaged_checkpoint_falls_back_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"checkpoint": {"every": 2}}
    crashed(tmp_path / "a", monkeypatch, **options)
    path = tmp_path / "a" / "checkpoints" / "step-4" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    toy(tmp_path / "a", kind=Crashing, **options).train(resume=True)
    toy(tmp_path / "b", kind=Crashing, **options).train()
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")
    assert "step-4 is damaged (optimizer.safetensors has another SHA-256" in caplog.text
    events = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    assert [event["reason"][:21] for event in events if event["event"] == "checkpoint_damaged"] == [
        "optimizer.safetensors"
    ]
    assert (tmp_path / "a" / "checkpoints" / "step-4.damaged").is_dir()


def test_no_whole_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"checkpoint": {"every": 2}}
    crashed(tmp_path, monkeypatch, **options)
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step-{step}" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no checkpoint is whole") as caught:
        toy(tmp_path, kind=Crashing, **options).train(resume=True)
    assert caught.value.exit_code == 4
    assert "step 4: model.safetensors is missing | step 2: model.safetensors is missing" in str(caught.value)


def test_a_changed_configuration_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="the configuration changed") as caught:
        toy(tmp_path, kind=Crashing, learning_rate=0.5, optimizer={"beta1": 0.8}).train(resume=True)
    assert caught.value.exit_code == 2
    assert "learning_rate: 0.02 → 0.5" in str(caught.value) and "optimizer.beta1: 0.9 → 0.8" in str(caught.value)


def test_some_options_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed(tmp_path, monkeypatch, checkpoint={"every": 2})
    trainer = toy(tmp_path, kind=Crashing, checkpoint={"every": 3, "keep": 5}, logging={"every": 2}, micro_batch_size=4)
    assert trainer.train(resume=True).step == 6
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    changed = next(event["changed"] for event in events if event["event"] == "run_resumed")
    assert "checkpoint.every: 2 → 3" in changed and "micro_batch_size: None → 4" in changed


def test_changed_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed(tmp_path, monkeypatch, checkpoint={"every": 2})
    rows = [*ROWS[:-1], {"prompt": "p", "response": "other"}]
    with pytest.raises(DataError, match="changed since the checkpoint"):
        toy(tmp_path, kind=Crashing, checkpoint={"every": 2}, rows=rows).train(resume=True)


def test_changed_held_out_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed(tmp_path, monkeypatch, checkpoint={"every": 2}, eval_rows=ROWS[:8])
    with pytest.raises(DataError, match=r"eval_data: the held-out rows.* changed since the checkpoint") as caught:
        toy(tmp_path, kind=Crashing, checkpoint={"every": 2}, eval_rows=ROWS[8:16]).train(resume=True)
    assert caught.value.exit_code == 3
    toy(tmp_path, kind=Crashing, checkpoint={"every": 2}, eval_rows=ROWS[:8]).train(resume=True)


def test_a_finished_run_is_returned_as_it_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = toy(tmp_path).train()
    before = model_bytes(tmp_path)
    with caplog.at_level(logging.INFO, "rlhf_core"):
        again = toy(tmp_path).train(resume=True)
    assert (again.step, again.metrics, model_bytes(tmp_path)) == (first.step, first.metrics, before)
    assert f"all of its {first.step} steps were done already" in caplog.text


def killer(kind: str, directory: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killer.py")), kind, str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("form", "save"), [("map", "middle"), ("map", "last"), ("streaming", "middle")])
def test_killed_at_every_write_of_a_save(tmp_path: Path, form: str, save: str) -> None:
    report = killer("every_write", tmp_path, form, save)
    assert report["different"] == []
    # At least: a directory, four files each written and fsynced, two fsyncs of directories, two renames, a removal.
    assert report["killed"] > 20 and report["steps"] == 10


@pytest.mark.slow
def test_killed_at_every_operation_of_a_start(tmp_path: Path) -> None:
    report = killer("every_start", tmp_path)
    assert report["different"] == []
    # At least: a directory, the lock, and seven files each written, fsynced and renamed.
    assert report["killed"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("form", ["map", "streaming"])
def test_killed_at_random_moments(tmp_path: Path, form: str) -> None:
    report = killer("random_moments", tmp_path, form)
    assert report["different"] == []
    assert report["killed"] >= 10 and report["files"][-1] == "model/model.safetensors"
