"""Train a method of these tests on one or several processes: each runs `processes.py JOB.json`.

The job names the method (`module:class`), its options, the arguments of its tiny model, and the run directory.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from forked_processes import run_script

from rlhf_core.models import PolicyModel
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


def train(method: str, options: dict[str, Any], output: Path, *, count: int, model: dict[str, Any]) -> Path:
    """Train on several processes; return the run directory.

    Args:
        method: `module:class`.
        count: number of processes.
        model: the arguments of `tiny_model`.
    """
    job = output.with_suffix(".json")
    job.write_text(json.dumps({"method": method, "options": options, "output": str(output), "model": model}))
    log = output.with_suffix(".log")
    run_script(Path(__file__), [str(job)], count, log=log)
    status = output / "status.json"
    ended = json.loads(status.read_text())["status"] if status.is_file() else "never begun"
    assert ended == "done", log.read_text()[-3000:]
    return output


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    module, name = job["method"].split(":")
    method = getattr(importlib.import_module(module), name)
    policy = PolicyModel(tiny_model(**job["model"]), tiny_tokenizer())
    rows = list(ArithmeticTask(terms=2, digits=1).rows(method.record, 16))
    method(method.Config.parse(job["options"]), model=policy, data=rows, output=job["output"]).train()
    # gloo's threads may abort a process that has done all its work; the run's own record says how it ended.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
