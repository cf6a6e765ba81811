"""The processes of one job, forked from a process that has already imported what takes seconds to import.

`torchrun` starts each process as a new one, and itself, and for a tiny model importing takes most of their time. What processes
compute together is the same either way; how they end, and what `torchrun` makes of it, is tested with `torchrun`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

IMPORTED = (
    "torch",
    "transformers.modeling_utils",
    "datasets",
    "accelerate",
    "rlhf_core.training.job",
    "rlhf_core.training.run",
)


def run_script(script: Path, arguments: Sequence[str], count: int, *, log: Path, seconds: float = 300) -> None:
    """Run a script as `torchrun --nproc_per_node COUNT` would, or as `python` would for one; return once all have ended.

    Args:
        log: file that they write stdout and stderr to.
        seconds: until they are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    places: list[dict[str, str]] = [{}]
    if count > 1:
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [context.Process(target=_run, args=(script, list(arguments), place, log)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            for each in processes:
                each.kill()
            raise TimeoutError(f"{script.name} took more than {seconds} s: {log.read_text()[-3000:]}")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _run(script: Path, arguments: list[str], place: dict[str, str], log: Path) -> None:
    import torch

    torch.set_num_threads(1)
    os.fsync = lambda file: None  # as in the tests' own process
    os.environ.update(place)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[:] = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
