"""A disk that is too small for what a run will write is reported before the first step, and in a dry run."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from toy import ROWS, toy

from rlhf_core.cli import main
from rlhf_core.config.training import TrainerConfig
from rlhf_core.infra.errors import StorageError
from rlhf_core.testing.tiny import save_tiny
from rlhf_core.training.disk_space import checkpoint_bytes_on_disk, checkpoints_at_once

usage = namedtuple("usage", "total used free")
NUMBERS = 263 * 8 + 8 + 8
"""What the toy trains: an embedding that is its head too, and a norm."""
CHECKPOINT = 4 * (3 * NUMBERS + 1)
"""Weights and AdamW's two moments in float32, and a buffer."""


def free(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(room, 0, room))


def test_too_little_room_is_reported_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 3 * CHECKPOINT + 4 * NUMBERS
    free(monkeypatch, needed - 1)
    trainer = toy(tmp_path / "run")
    with pytest.raises(StorageError, match=rf"too little free space .*: {needed} bytes are needed") as caught:
        trainer.train()
    assert caught.value.exit_code == 7 and trainer.windows == 0
    assert str(tmp_path / "run") in str(caught.value) and f"got {needed - 1} bytes free" in str(caught.value)
    free(monkeypatch, needed + 100_000)  # and what a save says of its own text
    assert toy(tmp_path / "run").train().step == 6


def test_what_was_written_really_is_what_was_said(tmp_path: Path) -> None:
    toy(tmp_path, checkpoint={"every": 1}).train()
    for step in (5, 6):
        files = (tmp_path / "checkpoints" / f"step-{step}").glob("*.safetensors")
        written = sum(path.stat().st_size for path in files)
        assert CHECKPOINT <= written <= CHECKPOINT + 4000  # headers, and a step count for each tensor
    assert checkpoint_bytes_on_disk(tmp_path) > 2 * CHECKPOINT


def test_what_is_there_already_counts_on_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(tmp_path, checkpoint={"every": 1}).train()
    free(monkeypatch, 2 * CHECKPOINT)
    assert toy(tmp_path, checkpoint={"every": 1}).train(resume=True).step == 6


@pytest.mark.parametrize(
    ("options", "steps", "count"),
    [
        ({}, 100, 3),
        ({}, 1, 1),
        ({}, None, 3),
        ({"checkpoint": {"minutes": None}}, 100, 1),
        ({"checkpoint": {"minutes": None, "every": 60}}, 100, 2),
        ({"checkpoint": {"keep": 4}}, 100, 5),
        ({"early_stopping": {}}, 100, 4),
        ({"early_stopping": {"keep_best": False}}, 100, 3),
    ],
)
def test_how_many_checkpoints_stand_at_once(options: dict[str, Any], steps: int | None, count: int) -> None:
    assert checkpoints_at_once(TrainerConfig.parse(options), steps) == count


def test_a_dry_run_reports_the_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [
        "train",
        "sft",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "new/run"),
    ]
    assert main([*command, "--dry-run"]) == 0
    assert "# disk: at most 3 checkpoints of " in capsys.readouterr().out
    free(monkeypatch, 1000)
    assert main([*command, "--dry-run"]) == 7
    errors = capsys.readouterr().err
    assert errors.startswith("error[io] ") and "bytes are needed" in errors and "got 1000 bytes free" in errors
    free(monkeypatch, 300_000)
    capsys.readouterr()
    assert main([*command, "--dry-run", "--lora.rank", "1"]) == 0
    assert "# disk: at most 3 checkpoints of " in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
