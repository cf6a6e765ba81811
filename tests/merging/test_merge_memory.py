"""A merge's memory doesn't grow with its inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_helpers import write_weights

# Peak anonymous memory, sampled while the merge runs.
WORKER = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, {helpers!r})
from merge_helpers import merge
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
folder = Path(sys.argv[2])
merge(sys.argv[1], [folder / "a", folder / "b"], folder / "out", base=folder / "base", threads=2)
done.set()
watcher.join()
print(peak[0])
"""


def _peak(method: str, folder: Path) -> int:
    command = [sys.executable, "-c", WORKER.format(helpers=str(Path(__file__).parent)), method, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("method", ["linear", "ties", "dare", "slerp"])
def test_eight_times_the_model_takes_the_same_memory(method: str, tmp_path: Path) -> None:
    peaks = []
    for count in (4, 32):
        folder = tmp_path / str(count)
        for number, name in enumerate(("base", "a", "b")):
            one = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(number))
            write_weights(folder / name, {f"model.layers.{n}.w.weight": one + n for n in range(count)})
        peaks.append(_peak(method, folder))
    assert peaks[1] < 1.2 * peaks[0]
