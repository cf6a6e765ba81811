"""A pipeline that is killed in each of its stages ends with the same weights; SIGTERM stops it with its state saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_in_each_stage_and_resumed_it_ends_with_the_same_weights(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_pipeline.py"), str(folder)],
        capture_output=True, text=True, env=environment(), timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    # A tiny stage may end between what is waited for and the kill; trainings are long enough.
    running = {stage for stage, status in report["killed_in"] if status == "running"}
    assert {"sft", "judge", "grpo", "improve"} <= running, report["killed_in"]
    assert report["different"] == [] and len(report["compared"]) >= 7
    assert report["measured"][0] == report["measured"][1]
    assert report["resumed"] >= len(running)


RECIPE = """\
model: model
output: out
defaults: {batch_size: 4, max_steps: 4000, learning_rate: 1e-3, dataset: {wrap: none}, checkpoint: {every: 5}}
stages:
  - {method: sft, data: sft.jsonl, max_steps: 3}
  - {name: long, method: sft, data: sft.jsonl}
"""


def run(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlhf_core", "run", "recipe.yaml", *flags]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def alive(text: str) -> list[int]:
    """Return the processes whose command line has a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in command:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a child ends with its parent on Linux alone")
def test_processes_stop_on_request_end_with_the_pipeline_and_go_on(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE)
    mine = str((folder / "out/stages/02-long.yaml").resolve())
    checkpoints = folder / "out/stages/02-long/checkpoints"
    first = run(folder)
    wait_for(checkpoints / "step-5", first)
    # Another process is refused while this one runs.
    other = run(folder, "--resume")
    out, err = other.communicate(timeout=240)
    assert other.returncode == 7 and "running this pipeline" in err
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=240)
    assert first.returncode == 75, (out, err)
    assert "error[stopped]" in err and "[2/2] long (train sft) stopped" in out
    record = json.loads((folder / "out/pipeline.json").read_text())
    assert (record["status"], record["exit_code"]) == ("stopped", 75) and record["stages"][1]["status"] == "stopped"
    stopped_at = json.loads((folder / "out/stages/02-long/run.json").read_text())["step"]
    # Killed outright, it takes the stage's process with it.
    second = run(folder, "--resume")
    wait_for(checkpoints / f"step-{(stopped_at // 5 + 2) * 5}", second)
    assert alive(mine)
    second.kill()
    second.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while alive(mine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(mine)
    assert json.loads((folder / "out/pipeline.json").read_text())["status"] == "running"
