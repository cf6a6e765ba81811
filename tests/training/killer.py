"""Runs toy trainings in forked children, kills them, resumes them, and compares with the run that was never killed.

A script of its own, so that no thread of a test runner is forked. `killer.py KIND DIRECTORY [streaming] [last]`
prints a JSON report.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported before the forks, which would each pay for them.
import accelerate  # noqa: F401
import datasets  # noqa: F401
import pandas  # noqa: F401
import pyarrow.compute  # noqa: F401
import torch
from toy import ROWS, ToyTrainer, toy

from rlhf_core.training.checkpoint import CheckpointManager
from rlhf_core.training.logger import without_timing

OPERATIONS = ("write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
LAST_SAVE = 5
"""How often a run saves; the third save is the first that has an older checkpoint to prune."""


def train(output: Path, data: Path, streaming: bool, **how: bool) -> None:
    toy(
        output,
        rows=str(data),
        eval_rows=ROWS[:8],
        max_steps=10,
        eval_steps=4,
        checkpoint={"every": 2},
        dataset={"streaming": streaming, "shuffle_block": 16},
    ).train(**how)


def forked(action: Callable[[], None], after: float | None = None) -> int:
    """Run an action in a child, killed `after` so many seconds; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(save_number: int, at: int, action: Callable[[], None]) -> None:
    """Do the action; kill this process within the `at`-th operation on files of the chosen save."""
    count = 0
    saves = 0
    armed = False

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if armed:
                count += 1
                if count == at:
                    if name == "write":
                        # Half of the bytes get there.
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, operation)

    for name in OPERATIONS:
        wrap(name)
    save = CheckpointManager.save

    def counted(self: CheckpointManager, *arguments: Any) -> Path:
        nonlocal saves, armed
        saves += 1
        armed = saves == save_number
        try:
            return save(self, *arguments)
        finally:
            armed = False

    CheckpointManager.save = counted  # type: ignore[method-assign]
    action()


def outcome(output: Path) -> dict[str, Any]:
    """Return what two runs must share to the last bit."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    newest = max(CheckpointManager(output / "checkpoints").steps())
    directory = output / "checkpoints" / f"step-{newest}"
    return {
        "metrics": [without_timing(row) for row in rows],
        "checkpoints": CheckpointManager(output / "checkpoints").steps(),
        "files": {
            str(path.relative_to(output)): path.read_bytes().hex()
            for path in (*directory.glob("*.safetensors"), output / "model" / "model.safetensors")
        },
        "hidden": sorted(path.name for path in (output / "checkpoints").glob(".*")),
    }


def differing(output: Path, expected: dict[str, Any]) -> list[str]:
    """Return what of a run's outcome is not as expected."""
    return [name for name, value in outcome(output).items() if value != expected[name]]


def every_write(root: Path, data: Path, streaming: bool, expected: dict[str, Any], save: int) -> dict[str, Any]:
    """Kill a run within every operation of one save, each time resume it to its end."""
    killed = 0
    different = []
    while True:
        output = root / f"write-{killed + 1}"
        at = killed + 1
        if (
            forked(lambda at=at, output=output: dying(save, at, lambda: train(output, data, streaming, resume=False)))
            == 0
        ):
            break
        killed += 1
        code = forked(lambda output=output: train(output, data, streaming, resume=True))
        if code or outcome(output) != expected:
            different.append([at, code, *differing(output, expected)])
    return {"killed": killed, "different": different}


def every_start(root: Path, data: Path, streaming: bool, expected: dict[str, Any]) -> dict[str, Any]:
    """Kill a run within every operation on files before its first step; then start, replace and resume what it left."""
    killed = 0
    different = []
    operations = forked_count(lambda: starting(0, lambda: train(root / "counted", data, streaming, resume=False)))
    for at in range(1, operations + 1):
        output = root / f"start-{at}"
        forked(lambda at=at, output=output: starting(at, lambda: train(output, data, streaming, resume=False)))
        killed += 1
        for how in ("start", "overwrite" if at % 2 else "resume"):
            copy = root / f"start-{at}-{how}"
            shutil.copytree(output, copy) if output.exists() else None
            record = copy / "run.json"
            began = record.exists() and json.loads(record.read_text())["status"] == "running"
            code = forked(
                lambda copy=copy, how=how: train(copy, data, streaming, **({how: True} if how != "start" else {}))
            )
            # A run that has a record is asked about, and nothing else is.
            if (code == 0) == (how == "start" and began) or (code == 0 and outcome(copy) != expected):
                different.append([at, how, code, began])
            shutil.rmtree(copy)
    return {"killed": killed, "different": different}


def forked_count(action: Callable[[], int]) -> int:
    """Run an action in a child; return the number that it returned, at most 255."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def starting(at: int, action: Callable[[], None]) -> int:
    """Do the action up to its first step; kill this process within the `at`-th operation on files. Return their number."""
    count = 0

    class Begun(Exception):
        pass

    def begun(self: ToyTrainer, *_: Any) -> None:
        raise Begun

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, operation)

    for name in OPERATIONS:
        wrap(name)
    ToyTrainer.experience = begun  # type: ignore[method-assign, assignment]
    with contextlib.suppress(Begun):
        action()
    return count


def random_moments(root: Path, data: Path, streaming: bool, expected: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Kill runs at random moments, up to three times each with a resume between, until ten kills have struck."""
    draw = random.Random(1)
    killed = runs = 0
    different = []
    while killed < 10:
        runs += 1
        output = root / f"moment-{runs}"
        for _ in range(3):
            code = forked(
                lambda output=output: train(output, data, streaming, resume=True),
                after=draw.uniform(0.05, 0.9) * seconds,
            )
            if code != -signal.SIGKILL:
                break
            killed += 1
        code = forked(lambda output=output: train(output, data, streaming, resume=True))
        if code or outcome(output) != expected:
            different.append([runs, code, *differing(output, expected)])
    return {"killed": killed, "different": different}


def main() -> None:
    # Counted and killed at like the others; what was written outlives a process without it.
    os.fsync = lambda file: None
    kind, root, streaming = sys.argv[1], Path(sys.argv[2]), "streaming" in sys.argv
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    begin = time.perf_counter()
    assert forked(lambda: train(root / "whole", data, streaming, resume=False)) == 0
    seconds = time.perf_counter() - begin
    expected = outcome(root / "whole")
    if kind == "every_write":
        report = every_write(root, data, streaming, expected, LAST_SAVE if "last" in sys.argv else LAST_SAVE - 1)
    elif kind == "every_start":
        report = every_start(root, data, streaming, expected)
    else:
        report = random_moments(root, data, streaming, expected, seconds)
    print(json.dumps(report | {"steps": len(expected["metrics"]), "files": sorted(expected["files"])}))


if __name__ == "__main__":
    main()
