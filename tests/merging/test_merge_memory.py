"""A merge's memory doesn't grow with its inputs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import merge_helpers
import psutil
import pytest
import torch
from merge_helpers import write_weights

WORKER = """
import sys, threading
from pathlib import Path
sys.path.insert(0, {helpers!r})
from merge_helpers import merge
if sys.argv[3] == "threads":
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # a process with threads isn't forked
folder = Path(sys.argv[2])
merge(sys.argv[1], [folder / "a", folder / "b"], folder / "out", base=folder / "base", threads=2)
"""


def _anonymous(family: list[psutil.Process]) -> int:
    """Return the anonymous memory of some processes, kB, each page counted once."""
    texts = [Path(f"/proc/{one.pid}/smaps_rollup").read_text() for one in family]
    return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if "Pss_Anon" in line)


def _peak(method: str, folder: Path, how: str) -> int:
    command = [
        sys.executable,
        "-c",
        WORKER.format(helpers=str(Path(merge_helpers.__file__).parent)),
        method,
        str(folder),
        how,
    ]
    peak, most = 0, 0
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while not (folder / "out").exists() and process.poll() is None:
            with suppress(OSError, psutil.Error):  # one has just ended
                family = [one := psutil.Process(process.pid), *one.children(recursive=True)]
                most = max(most, len(family))
                peak = max(peak, _anonymous(family))
            time.sleep(0.002)
    assert process.returncode == 0
    assert most == (3 if how == "processes" else 1)
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(
    ("method", "how"),
    [(method, "processes") for method in ("linear", "ties", "dare", "slerp")] + [("ties", "threads")],
)
def test_eight_times_the_model_takes_the_same_memory(method: str, how: str, tmp_path: Path) -> None:
    peaks = []
    for count in (4, 32):
        folder = tmp_path / str(count)
        for number, name in enumerate(("base", "a", "b")):
            one = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(number))
            write_weights(folder / name, {f"model.layers.{n}.w.weight": one + n for n in range(count)})
        peaks.append(_peak(method, folder, how))
    assert peaks[1] < 1.2 * peaks[0]
