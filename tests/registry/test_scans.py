"""Installed distributions are scanned once per process, whatever a command does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rlhf_core.testing.tiny import save_tiny

WATCH = """
import os, sys

def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith("watched-1.0.dist-info/entry_points.txt"):
        if os.path.join("rlhf_core", "registry") in sys._getframe(1).f_code.co_filename:  # torch and pydantic read it, too
            with open(os.environ["SCANS"], "a") as file:
                print(os.getpid(), file=file)

sys.addaudithook(note)
"""
"""Notes the process that reads the entry points of a certain distribution, as each scan does once."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a distribution to watch, a model and rows, for use as the current directory and on `sys.path`."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    metadata = tmp_path / "watched-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: watched\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[rlhf_core.rewards]\nwatched = watched:Reward\n")
    return tmp_path


def scans(place: Path, *command: str) -> Counter[str]:
    """Run a command and return how often each process of it scanned, by process id."""
    noted = place / "scans.txt"
    noted.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(place), "SCANS": str(noted), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", *command]
    done = subprocess.run(start, cwd=place, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return Counter(noted.read_text().split())


def train(place: Path) -> list[str]:
    """Write a model and rows; return the arguments of a run that trains on them and writes beside them."""
    save_tiny(place / "model")
    rows = [{"prompt": f"{number} + 1", "chosen": "right", "rejected": "wrong"} for number in range(8)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", "model", "--data", "pairs.jsonl", "--output", "run", "--max_steps", "2", "--batch_size", "4"]
    return ["rlhf_core", "train", "dpo", *options]


@pytest.mark.parametrize("verb", [["list"], ["show", "dpo"], ["show", "dpo", "--all"], ["schema", "dpo"]])
def test_a_command_scans_once(place: Path, verb: list[str]) -> None:
    assert list(scans(place, "rlhf_core", *verb).values()) == [1]


def test_a_check_scans_once_in_each_of_its_two_processes(place: Path) -> None:
    assert list(scans(place, "rlhf_core", "list", "rewards", "--check").values()) == [1, 1]


def test_a_run_scans_once(place: Path) -> None:
    assert list(scans(place, *train(place)).values()) == [1]


@pytest.mark.slow
def test_each_process_of_a_distributed_run_scans_once(place: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    assert list(scans(place, *torchrun, *train(place)).values()) == [1, 1]
