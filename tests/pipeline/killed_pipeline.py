"""Runs a pipeline whose commands are forked children, kills all of it in each of its stages, resumes it, and compares.

A script of its own, so that no thread of a test runner is forked. `killed_pipeline.py FOLDER` prints a JSON report: in which
stages it was killed while they ran, and which results differ from those of the pipeline that was never killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Imported before the forks, which would each pay for them.
import accelerate  # noqa: F401
import datasets  # noqa: F401
import pandas  # noqa: F401
import pyarrow.compute  # noqa: F401
import torch
from rlhf_plugins.trainers import grpo, reward_model, sft  # noqa: F401

from rlhf_core import RLHFOrchestrator
from rlhf_core.cli import main
from rlhf_core.cli.app import app  # noqa: F401
from rlhf_core.models import PolicyModel, RewardModel  # noqa: F401
from rlhf_core.pipeline.stage_command import raise_ended

DRAWN: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 1}
STAGES: list[dict[str, Any]] = [
    {"method": "sft", "data": "sft.jsonl"},
    {"name": "judge", "method": "reward_model", "data": "preference.jsonl"},
    {"method": "grpo", "data": "prompt.jsonl", "reward": "judge", "group_size": 2, "generation": {"max_new_tokens": 6}},
    {"name": "drawn", "kind": "sample", "method": "best_of_n", "reward": "judge", "prompts": "prompt.jsonl", **DRAWN},
    {"name": "measured", "kind": "evaluate", "prompts": "reasoning.jsonl", "validator": "numeric_answer", "n": 2, **DRAWN},
    {"kind": "improve", "prompts": "prompt.jsonl", "check": "any.py:score", "at_least": 0.0,
     "sampler": {"method": "generate", "n": 2, **DRAWN}, "train": {"method": "sft"}},
    {"name": "soup", "kind": "merge", "method": "linear", "models": ["sft", "grpo", "improve"]},
]  # fmt: skip
DEFAULTS = {
    "batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "dataset": {"wrap": "none"},
    "checkpoint": {"every": 1},
}


def begun(pattern: str) -> Callable[[Path], bool]:
    """Return whether a file or folder of that name is there and not empty."""
    return lambda folder: any(path.is_dir() or path.stat().st_size for path in folder.glob(pattern))


KILLS: list[tuple[str, Callable[[Path], bool]]] = [
    ("sft", begun("01-sft/checkpoints/step-2")),
    ("judge", begun("02-judge/checkpoints/step-3")),
    ("grpo", begun("03-grpo.yaml")),  # before its first step, too
    ("grpo", begun("03-grpo/checkpoints/step-2")),
    ("drawn", begun("04-drawn/rows.jsonl")),
    ("measured", begun("05-measured/completions.jsonl")),
    ("improve", begun("06-improve/round-1/samples.jsonl")),
    ("improve", begun("06-improve/round-1/train/checkpoints/step-2")),
    ("soup", begun("07-soup.yaml")),
]
"""Stage, and what is there when the pipeline is killed in it."""


class InForks:
    """Runs each command of `rlhf` in a forked child of the pipeline's own process."""

    def __call__(self, arguments: Sequence[str], *, log: Path, processes: int = 1) -> str:
        out = log.with_suffix(".out")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for number, path in ((1, out), (2, log)):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
                out.write_text("")
                code = main(list(arguments))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        raise_ended(code, log.read_text() if log.exists() else "", log)
        return out.read_text()


def start(output: str, *, resume: bool) -> int:
    """Fork a pipeline into a session of its own; return its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            recipe = {"model": "model", "output": output, "defaults": DEFAULTS, "stages": STAGES}
            RLHFOrchestrator(recipe, run=InForks(), tell=lambda text: None).run_full_pipeline(resume=resume)
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def status(output: Path, stage: str) -> str:
    try:
        stages = json.loads((output / "pipeline.json").read_text())["stages"]
    except (OSError, ValueError):
        return "waiting"
    return next((one["status"] for one in stages if one["name"] == stage), "waiting")


def kill_in(output: Path, stage: str, there: Callable[[Path], bool]) -> str:
    """Run the pipeline until something of a stage is there, kill all of it; return the stage's status then."""
    pid = start(str(output), resume=True)
    deadline = time.monotonic() + 120
    while not there(output / "stages") and time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return "ended"
        time.sleep(0.001)
    os.killpg(pid, signal.SIGKILL)
    ended(pid)
    time.sleep(0.05)  # the lock goes with the last child
    return status(output, stage)


def results(output: Path) -> dict[str, str]:
    """Return name → hash of what two pipelines must share to the last bit: weights and rows."""
    wanted = [*output.glob("stages/**/model/*.safetensors"), *output.glob("stages/**/kept.jsonl")]
    wanted += output.glob("stages/04-drawn/rows.jsonl")
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(wanted)}


def measured(output: Path) -> dict[str, float]:
    values = json.loads((output / "stages/05-measured/evaluation.json").read_text())["metrics"]
    return {name: one["value"] for name, one in values.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    Path("any.py").write_text("def score(prompts, completions, **columns):\n    return [1.0] * len(completions)\n")
    whole, killed = Path("whole").resolve(), Path("killed").resolve()
    assert ended(start(str(whole), resume=False)) == 0
    at = [[stage, kill_in(killed, stage, there)] for stage, there in KILLS]
    assert ended(start(str(killed), resume=True)) == 0
    expected, found = results(whole), results(killed)
    events = [json.loads(line) for line in (killed / "history.jsonl").read_text().splitlines()]
    report = {
        "killed_in": at,
        "compared": sorted(expected),
        "different": sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)),
        "measured": [measured(whole), measured(killed)],
        "resumed": sum(event["event"] == "stage_resumed" for event in events),
    }
    print(json.dumps(report))
